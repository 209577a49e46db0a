"A strategy: adapt, but pull the parameters back towards the source."
from ssm_metarl.adapter import AdaptationStrategy, register_adaptation_strategy


@register_adaptation_strategy('l2-sp')
class StayClose(AdaptationStrategy):
    "Adds weight / 2 times the squared distance (L2-SP; Li, Grandvalet & Davoine, ICML 2018)."
    weight = 20.0

    def configure(self, adapter):  # called once, before the first step
        if adapter.config.lr * self.weight >= 1:
            raise ValueError(f'lr={adapter.config.lr} lets the pull of l2-sp overshoot; '
                             f'take less than {1 / self.weight}')
        self.source = {k: p.detach().clone() for k, p in adapter.params.items()}

    def post_loss(self, loss, outputs, batch):  # loss: [M], one number for each task
        moved = [p - self.source[k] for k, p in self.adapter.params.items()]
        squared = sum(x.square().reshape(*loss.shape, -1).sum(-1) for x in moved)
        return loss + self.weight / 2 * squared
