"A learner: MAML in which the tasks that went badly count for more."
from ssm_metarl.maml import MetaMAML
from ssm_metarl.meta_learner import register_learner


def weights(returns):  # [M] -> [M], of mean 1
    "The lower the return after adaptation, the larger the weight."
    spread = returns.std(correction=0).clamp(min=1e-8)
    return len(returns) * (-(returns - returns.mean()) / spread).softmax(0)


@register_learner('worst-first')
class WorstFirst(MetaMAML):
    "A soft form of task-robust MAML (Collins, Mokhtari & Shakkottai, NeurIPS 2020)."

    def collect_all(self, tasks):
        (*support, (query, advantage)), reached = super().collect_all(tasks)
        advantage = weights(query.returns.mean(1))[:, None, None] * advantage
        return [*support, (query, advantage)], reached
