"""How much a linear classifier finds in frozen features."""

from __future__ import annotations

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy, percent, of a logistic regression on standardised features.

    Args:
        train: features [N, D].
        train_labels: class ids [N].
        test: features [M, D].
        test_labels: class ids [M].
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    model.fit(train.numpy(), train_labels.numpy())
    return 100 * float(model.score(test.numpy(), test_labels.numpy()))
