"""What pyproject.toml cannot say: recipes/ stands at the top of the project, and inside the package once installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tlkit*"]), "tlkit.recipes"],
    package_dir={"tlkit.recipes": "recipes"},
    package_data={
        "tlkit": ["py.typed", "networks/*.csv", "reports/*.html"],
        "tlkit.recipes": ["*/*.yaml", "*.sh", "*.cron", "*.py"],
    },
)
