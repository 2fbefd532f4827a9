"""METHODS: what `torchmae evaluate` can measure."""

from __future__ import annotations

from torchmae.evaluation import anomaly, attentive, finetune, knn, linear, multilabel, quality, segmentation
from torchmae.evaluation.anomaly_data import open_anomaly_data
from torchmae.evaluation.bench import Method
from torchmae.evaluation.segmentation_data import open_segmentation_data
from torchmae.evaluation.subject import PIXELS, RANDOM

METHODS: dict[str, Method] = {
    "knn": Method(knn.measure, beside=(RANDOM, PIXELS), several=multilabel.measure_knn),
    "linear": Method(linear.measure, beside=(RANDOM, PIXELS), several=multilabel.measure_linear),
    "attentive": Method(attentive.measure, "tokens", beside=(RANDOM,), left_out=attentive.left_out),
    "reconstruction": Method(quality.measure, "model", labelled=False),
    "finetune": Method(finetune.measure, "model"),
    "segmentation": Method(
        segmentation.measure,
        labelled=False,
        compared=(RANDOM, PIXELS),
        left_out=segmentation.left_out,
        open=open_segmentation_data,
    ),
    "anomaly": Method(anomaly.measure, labelled=False, compared=(RANDOM, PIXELS), open=open_anomaly_data),
}
"""Every method by name: what `--method` takes, beside "all". A method is a file beside this one and a row."""
