"""Predictions from a model: for one process, and for clusters of them."""

from repvgg_deploy.serving.predictor import Prediction as Prediction
from repvgg_deploy.serving.predictor import PredictOptions as PredictOptions
from repvgg_deploy.serving.predictor import Predictor as Predictor
from repvgg_deploy.serving.predictor import PredictorSpec as PredictorSpec
