"""What is wrong in a folder of images: unreadable and odd files, copies, leaks between splits, suspect labels."""
