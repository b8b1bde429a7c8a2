"""How long will the answer be? A small classifier beside a main model (TetriInfer, section 3.3.2).

``LengthPredictor`` reads a prompt's tokens and gives a probability to each range of answer lengths. It is trained from
the main model's own answers (``python -m common.models.length_predictor.train``) and lies in the main model's folder,
in ``length_predictor/``. Where there is none, ``AnswerLengths`` goes by a running histogram and says so.
"""

from common.models.length_predictor.lengths import AnswerLengths
from common.models.length_predictor.predictor import LengthPredictor, PredictorLoadError

__all__ = ["AnswerLengths", "LengthPredictor", "PredictorLoadError"]
