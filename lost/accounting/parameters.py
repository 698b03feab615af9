"""Number of trained parameters of a model."""

from lost.accounting.costs import linear_costs, sum_of
from lost.config.model import ModelConfig, ParameterizationConfig


def count_parameters(model: ModelConfig, parameterization: ParameterizationConfig) -> int:
    """Trained numbers: embedding, linear layers, norms, lm_head (once if it is the embedding); indices are none.

    Raises:
        ConfigError: the parameterization does not fit the model, for instance a rank above the width of a layer.
    """
    costs = linear_costs(model, parameterization)
    head = 0 if model.tie_word_embeddings else costs[-1].num_parameters
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return model.vocab_size * model.hidden_size + sum_of(costs[:-1], "num_parameters") + norms + head
