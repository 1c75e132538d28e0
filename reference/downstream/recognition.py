"""Recognition of categories and attributes by a linear probe of the frozen model.

The papers train their whole model further, with a classifier on the fused CLS of image and text.
Here the model stays as it is and a logistic regression reads it, as in CLIP's evaluation: it takes
seconds, and what it finds was there before. Three inputs are probed:

- ``image``: the CLS of the image alone. This is the figure to look at.
- ``text``, ``fused``: the CLS of the caption, and of image and caption fused as in the papers. On
  most fashion data the caption names the category ("Nike Men ... Shorts"), so these two say how
  well a word is read, not how well an image is seen.

As every image has one label, micro-F equals accuracy and is not listed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from reference.downstream.features import Encodings
from reference.downstream.records import column
from reference.run_files import LabelRecognition, RecognitionScores

INPUTS = ("image", "text", "fused")
CHANCES = ("most_frequent", "uniform")


def recognise(encodings: Encodings, label: str) -> LabelRecognition:
    """Fit probes on the training split and score them on the validation split.

    Chance is the most frequent class of the training split, and its classes at random.

    Args:
        encodings: what the model makes of both splits.
        label: key of the records. Images whose label training lacks count: always wrong.

    Raises:
        MissingRecords: a record lacks the label, or the training split is a stream.
    """
    splits = (encodings.train_pairs, encodings.data.val)
    wanted, truth = (np.asarray(column(split.records, label)) for split in splits)
    probes = {}
    for kind in tqdm(INPUTS, f"recognise {label}", unit="probe"):
        x, y = (getattr(split, kind).numpy() for split in (encodings.train, encodings.val))
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probes[kind] = _scores(truth, probe.fit(x, wanted).predict(y))
    # Repeated, so that what is drawn averages out.
    many = np.tile(truth, 100)
    chance = {}
    for kind in CHANCES:
        guess = DummyClassifier(strategy=kind, random_state=0).fit(wanted, wanted)
        chance[kind] = _scores(many, guess.predict(many))
    classes = np.unique(wanted)
    return {
        "probes": probes,
        "chance": chance,
        "classes": len(classes),
        "unseen": int((~np.isin(truth, classes)).sum()),
    }


def _scores(truth: NDArray, predicted: NDArray) -> RecognitionScores:
    """Accuracy, and the F score averaged over the classes of the truth."""
    macro = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(truth, predicted)), "macro_f": float(macro)}
