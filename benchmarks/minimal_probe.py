"""The main job by hand, in as few lines as it takes: what `tlkit finetune --strategy probe` is measured against.

    python benchmarks/minimal_probe.py DATA [--tuned]

Plain, it is what people write first: fp32, default layout. --tuned adds what tlkit does as well: bf16, channels-last, a
batch that fits the caches, two decoding processes.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset

from tlkit.networks.weights import names_from_package, package_file, read_weights


class Folder(Dataset):
    def __init__(self, root, transform):
        self.classes = sorted(folder.name for folder in root.iterdir())
        self.items = [(path, k) for k, name in enumerate(self.classes) for path in sorted((root / name).iterdir())]
        self.transform = transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        path, label = self.items[row]
        return self.transform(Image.open(path).convert("RGB")), label


def main():
    data, tuned = Path(sys.argv[1]), "--tuned" in sys.argv
    network = timm.create_model("tf_efficientnet_lite0")
    # its weights' names are the file's own: the one line that is borrowed
    network.load_state_dict(names_from_package(read_weights(package_file("tf_efficientnet_lite0")), network))
    network.eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    if tuned:
        network = network.to(memory_format=torch.channels_last)

    def features(split):
        found, labels = [], []
        loader = DataLoader(Folder(data / split, transform), batch_size=16 if tuned else 64, num_workers=2 * tuned)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=tuned):
            for images, batch_labels in loader:
                laid_out = images.contiguous(memory_format=torch.channels_last) if tuned else images
                pooled = network.forward_head(network.forward_features(laid_out), pre_logits=True)
                found.append(pooled.float())
                labels.append(batch_labels)
        return torch.cat(found).double().numpy(), torch.cat(labels).numpy()

    (train, train_labels), (val, val_labels) = features("train"), features("val")
    mean, std = train.mean(0), train.std(0) + 1e-8
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    head = LogisticRegressionCV(Cs=10.0 ** np.arange(-6, 2), cv=folds, scoring="neg_log_loss", max_iter=500)
    head.fit((train - mean) / std, train_labels)
    print(int((head.predict((val - mean) / std) == val_labels).sum()), len(val))


if __name__ == "__main__":
    main()
