"A memory: an SSM whose dynamics stay as they were drawn."
from ssm_metarl.cores import register_core
from ssm_metarl.ssm import SSM

DYNAMICS = 'log_decay', 'frequency', 'log_dt'  # the parameters that set A and the step size


@register_core('reservoir')
class Reservoir(SSM):
    "Learns what to write (B) and to read (C, D), as an echo state network does (Jaeger, 2001)."

    def stepper(self, params=None):
        params = dict(self.named_parameters()) if params is None else params
        fixed = {name: params[name].detach() for name in DYNAMICS if name in params}
        return super().stepper(params | fixed)
