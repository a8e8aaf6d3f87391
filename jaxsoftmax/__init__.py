"""The softmax output layer for JAX: logits, softmax and log-likelihood cost, exactly differentiated."""

from ._comparison import GradientComparison as GradientComparison
from ._cost import log_likelihood_cost as log_likelihood_cost
from ._cost import quadratic_cost as quadratic_cost
from ._cost import weight_penalty as weight_penalty
from ._gradients import compare_gradients as compare_gradients
from ._head import HeadStatistics as HeadStatistics
from ._head import SparseLabels as SparseLabels
from ._head import TeacherLabels as TeacherLabels
from ._head import head_statistics as head_statistics
from ._head import linear_log_likelihood_cost as linear_log_likelihood_cost
from ._network import Dense as Dense
from ._network import Network as Network
from ._network import backpropagate as backpropagate
from ._network import init_network as init_network
from ._network import logits as logits
from ._network import network_cost as network_cost
from ._network import predict as predict
from ._network import predict_probabilities as predict_probabilities
from ._rules import without_custom_rules as without_custom_rules
from ._softmax import log_softmax as log_softmax
from ._softmax import softmax as softmax
from ._softmax import softmax_jacobian as softmax_jacobian
from ._training import TrainState as TrainState
from ._training import init_state as init_state
from ._training import make_epoch as make_epoch
from ._training import make_step as make_step
