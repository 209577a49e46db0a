"An environment: point navigation in a wind that the agent does not observe."
from ssm_metarl.envs import PointNavigation, register_family


@register_family('WindyNavigation-v0')
class WindyNavigation(PointNavigation):
    "Each task has a hidden goal and a hidden, steady wind, which moves the point in every step."

    def __init__(self,
                 wind: float = 0.05): # largest speed along each axis; a storm has twice that
        if not 0 < wind <= 0.05:
            raise ValueError(f'wind={wind} is not in (0, 0.05]; the agent itself moves by 0.1')
        super().__init__()
        self.ranges['wind'] = ([-wind] * 2, [wind] * 2)
        storm = {'wind': ([-2 * wind] * 2, [2 * wind] * 2)}
        self.ood_splits = self.ood_splits | {'storm': storm}

    def step(self, state, action, tasks, noise):
        return super().step(state + tasks['wind'], action, tasks, noise)

    def oracle(self, state, tasks):  # knows the goal and the wind
        return super().oracle(state + tasks['wind'], tasks)
