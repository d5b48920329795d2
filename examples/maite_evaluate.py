"""Certified accuracy of a model by MAITE's `evaluate`. It takes `pip install "bagcert[maite]"`.

python examples/maite_evaluate.py            # the digits that come with scikit-learn
python examples/maite_evaluate.py MODEL DATA PATCH
"""

import sys

from maite.tasks import evaluate

import bagcert
from bagcert.data import load_dataset
from bagcert.evaluation.maite import CertifiedAccuracy, Dataset, Model

name, data, patch = (*sys.argv[1:], *("digits", "digits", "2")[len(sys.argv) - 1 :])
defense = bagcert.load(name)
found, _, _ = evaluate(
    model=Model(defense, patch),
    dataset=Dataset(load_dataset(data), defense),
    metric=CertifiedAccuracy(),
    batch_size=64,
)
print(f"{found['images']} images, patch {patch} px of the image")
for accuracy in ("clean_accuracy", "certified_accuracy"):
    low, high = found["interval95"][accuracy]
    print(f"{accuracy.replace('_', ' ')} {found[accuracy]:.1%} (95 % interval {low:.1%} to {high:.1%})")
