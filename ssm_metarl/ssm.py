import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def linear(
    x: Tensor, # [..., D]; with one weight per task [M, ..., D]
    weight: Tensor, # [H, D], or one per task: [M, H, D]
    bias: Tensor = None, # [H], or [M, H]
) -> Tensor: # [..., H]
    "A linear map with one weight for all, or with one weight for each of M tasks in a single batched product. Raises ValueError if x is not M tasks."
    if weight.dim() == 2: return nn.functional.linear(x, weight, bias)
    if len(x) != len(weight): raise ValueError(f'x is {list(x.shape)} but the weights are for {len(weight)} tasks; x must be [{len(weight)}, ..., D]')
    flat = x.reshape(len(weight), -1, x.shape[-1])  # [M, everything else, D]
    y = (torch.bmm(flat, weight.mT) if bias is None
         else torch.baddbmm(bias[:, None], flat, weight.mT))
    return y.view(*x.shape[:-1], -1)


def _check_reset(reset, shape):
    if reset is not None and (reset.dtype != torch.bool or reset.shape != shape):
        raise ValueError(f'reset is {reset.dtype} {list(reset.shape)}; it must be torch.bool {list(shape)}, one flag for each step')


def _shift(x, first, dim):  # x delayed by one step along dim, beginning with `first`
    return torch.cat([first.unsqueeze(dim), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


class _Scan(torch.autograd.Function):
    "h_t = a_t * (0 if reset_t else h_{t-1}) + b_t, in a loop without a graph; its backward is the same scan in reverse time."

    @staticmethod
    def forward(a, b, h0, reset):  # a [..., T or 1, N], b [..., T, N], h0 [..., N], reset [..., T]
        b_first = b.movedim(-2, 0).contiguous()  # time first: every slice is one block of memory
        a_first = a.expand(*a.shape[:-2], b.shape[-2], a.shape[-1]).movedim(-2, 0)
        reset_first = reset.movedim(-1, 0).unsqueeze(-1)
        cut = reset_first.flatten(1).any(1).tolist()  # steps at which any sequence restarts
        out = torch.empty_like(b_first)
        h = h0
        for t, (a_t, b_t, h_t) in enumerate(zip(a_first.unbind(0), b_first.unbind(0), out.unbind(0))):
            if cut[t]: h = h.masked_fill(reset_first[t], 0)
            h = torch.addcmul(b_t, a_t, h, out=h_t)
        return out.movedim(0, -2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, h0, reset = inputs
        ctx.save_for_backward(a, h0, reset, output)

    @staticmethod
    def backward(ctx, grad):
        a, h0, reset, h = ctx.saved_tensors
        last = reset.new_zeros(reset.shape[:-1])
        a_next = a if a.shape[-2] == 1 else a.roll(-1, -2)  # a_{t+1}; the last entry multiplies a zero state
        reset_next = torch.cat([reset[..., 1:], last.unsqueeze(-1)], -1)
        # g_t = grad_t + conj(a_{t+1}) g_{t+1}, cut where step t+1 was a reset: a scan of the reversed sequence
        g = _Scan.apply(a_next.conj().resolve_conj().flip(-2), grad.flip(-2), torch.zeros_like(h0), reset_next.flip(-1)).flip(-2)
        before = _shift(h, h0, -2).masked_fill(reset.unsqueeze(-1), 0)  # the state that a_t multiplied
        before = before.masked_fill((g == 0) & ~before.isfinite(), 0)  # a poisoned past that no loss depends on: 0 * inf would be nan
        grad_a = (g * before.conj()).sum_to_size(a.shape)
        grad_h0 = (a[..., 0, :].conj() * g[..., 0, :]).masked_fill(reset[..., :1], 0)
        return grad_a, g, grad_h0.sum_to_size(h0.shape), None

    @staticmethod
    def vmap(info, in_dims, a, b, h0, reset):
        rank = b.dim() - (in_dims[1] is not None)
        def front(x, dim, rank):  # mapped dimension first, the others aligned to the right
            x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            return x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:])
        a, b = front(a, in_dims[0], rank), front(b, in_dims[1], rank)
        h0, reset = front(h0, in_dims[2], rank - 1), front(reset, in_dims[3], rank - 1)
        b = b.expand(info.batch_size, *b.shape[1:])
        h0, reset = h0.expand(b[..., 0, :].shape), reset.expand(b.shape[:-1])
        return _Scan.apply(a, b, h0, reset), 0


def scan(
    a: Tensor, # decays, real or complex, broadcastable to b: [N], [..., 1, N] or [..., T, N]
    b: Tensor, # inputs, [..., T, N]
    h0: Tensor = None, # state before the first step, [..., N]; zero if not given
    reset: Tensor = None, # bool [..., T]; True: step t starts from a zero state
) -> Tensor: # all states, [..., T, N]
    "The linear recurrence h_t = a_t h_{t-1} + b_t, twice differentiable; a reset cuts the past, in values and gradients. Raises ValueError for shapes that do not fit."
    T, N = b.shape[-2:]
    _check_reset(reset, b.shape[:-1])
    if h0 is not None and h0.shape != b.shape[:-2] + (N,):
        raise ValueError(f'h0 is {list(h0.shape)}; it must be {[*b.shape[:-2], N]}, one state for each sequence of b')
    if a.dim() > b.dim() or any(i not in (1, j) for i, j in zip(a.shape[::-1], b.shape[::-1])):
        raise ValueError(f'a is {list(a.shape)}; it must broadcast to b, {list(b.shape)}')
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if T == 0: return b
    if a.dim() < 2: a = a.expand(1, N)
    h0 = b.new_zeros(b.shape[:-2] + (N,)) if h0 is None else h0.to(dtype)
    reset = torch.zeros(b.shape[:-1], dtype=torch.bool, device=b.device) if reset is None else reset
    return _Scan.apply(a, b, h0, reset)


def phi1(
    x: Tensor, # real or complex
) -> Tensor: # (exp(x) - 1) / x, and 1 at x = 0
    "The zero-order-hold factor, accurate in float32 near zero too, where (exp(x) - 1) / x loses all its digits."
    small = x.abs() < 1e-2
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    safe = torch.where(small, torch.ones_like(x), x)
    if not x.is_complex(): return torch.where(small, series, torch.expm1(safe) / safe)
    u, v = safe.real, safe.imag  # exp(u+iv) - 1 = expm1(u) cos v - 2 sin^2(v/2) + i exp(u) sin v
    expm1 = torch.complex(torch.expm1(u) * v.cos() - 2 * (v / 2).sin() ** 2, u.exp() * v.sin())
    return torch.where(small, series, expm1 / safe)


def hippo_legs(
    N: int, # state size
) -> tuple: # A [N, N], B [N], both float64
    "HiPPO-LegS: the ODE whose state holds the Legendre coefficients of all its input so far (Gu et al., NeurIPS 2020)."
    n = np.arange(N)
    r = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(r, r), -1) - np.diag(n + 1.), r


def legs_eigenvalues(
    P: int, # number of conjugate pairs; the matrix is 2P x 2P
) -> np.ndarray: # complex [P], positive imaginary parts, ascending
    "Eigenvalues of the normal part of HiPPO-LegS: A + p p^T with p = sqrt(n + 1/2) is -1/2 plus a skew matrix (Gu et al., S4, ICLR 2022)."
    A, B = hippo_legs(2 * P)
    S = A + np.outer(B, B) / 2
    return -0.5 + 1j * np.sort(np.linalg.eigvalsh(-1j * (S + 0.5 * np.eye(2 * P))))[P:]


def lru_eigenvalues(
    P: int, # number of eigenvalues
    rng: np.random.Generator, # source of randomness
    radius: tuple = (0.9, 0.999), # smallest and largest |lambda_bar|
) -> np.ndarray: # complex [P]: log of points spread evenly over the upper half of a ring
    "Log of eigenvalues drawn uniformly by area from the ring radius[0] <= |lambda_bar| <= radius[1] (Orvieto et al., ICML 2023)."
    r0, r1 = radius
    return 0.5 * np.log(rng.uniform(size=P) * (r1**2 - r0**2) + r0**2) + 1j * np.pi * rng.uniform(size=P)


INITS = ('lru', 'legs', 'real')


@dataclass(frozen=True)
class SSMConfig:
    "Sizes and initialisation of one state space layer. Raises ValueError for sizes, step sizes or an `init` that make no layer."
    input_dim: int # D, features in
    state_dim: int = 64 # N, real numbers of state: N / 2 complex-conjugate pairs, or N real modes
    output_dim: int = None # H, features out; None: as many as in
    init: str = 'lru' # eigenvalues: 'lru' (ring), 'legs' (HiPPO), or 'real' (the ring without phase: leaky integrators)
    dt_min: float = 1e-3 # smallest step size, for 'legs'
    dt_max: float = 1e-1 # largest step size, for 'legs'

    def __post_init__(self):
        if self.output_dim is None: object.__setattr__(self, 'output_dim', self.input_dim)
        for name in ('input_dim', 'state_dim', 'output_dim'):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)!r} is not a positive int')
        if self.init not in INITS: raise ValueError(f'init={self.init!r} is not one of {INITS}')
        if self.init != 'real' and self.state_dim % 2:
            raise ValueError(f'state_dim={self.state_dim} is odd, but complex states come in conjugate pairs; take {self.state_dim + 1}')
        if not 0 < self.dt_min <= self.dt_max: raise ValueError(f'dt_min={self.dt_min}, dt_max={self.dt_max}; need 0 < dt_min <= dt_max')

    @property
    def modes(self) -> int:
        "P, the number of eigenvalues that the layer stores: one for each conjugate pair, or one for each real mode."
        return self.state_dim if self.init == 'real' else self.state_dim // 2


def initial_modes(
    config: SSMConfig, # sizes and initialisation
    rng: np.random.Generator, # source of randomness
) -> tuple: # eigenvalues lam [P], step sizes dt [P]
    "Continuous eigenvalues and step sizes at the start of training."
    if config.init == 'legs': return legs_eigenvalues(config.modes), np.exp(rng.uniform(np.log(config.dt_min), np.log(config.dt_max), config.modes))
    lam = lru_eigenvalues(config.modes, rng)
    return lam.real if config.init == 'real' else lam, np.ones(config.modes)


def initial_parameters(
    config: SSMConfig, # sizes and initialisation
    seed: int, # the same seed gives the same parameters
) -> dict: # name -> real tensor of the default dtype
    "Parameters that turn unit-variance input into unit-variance states and outputs, |B_bar|^2 = 1 - |A_bar|^2 (the gamma of the LRU, Orvieto et al., ICML 2023)."
    rng = np.random.default_rng([seed, 0x55A])
    lam, dt = initial_modes(config, rng)
    normal = rng.standard_normal if config.init == 'real' else lambda shape: (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)
    B_bar = normal((config.modes, config.input_dim)) * np.sqrt(-np.expm1(2 * lam.real * dt) / config.input_dim)[:, None]
    B = B_bar * (lam / np.expm1(lam * dt))[:, None]
    C = normal((config.output_dim, config.modes)) / np.sqrt(config.state_dim)
    D = rng.standard_normal((config.output_dim, config.input_dim)) / np.sqrt(config.input_dim)
    arrays = dict(log_decay=np.log(-lam.real), frequency=lam.imag, log_dt=np.log(dt), B_real=B.real, B_imag=B.imag, C_real=C.real, C_imag=C.imag, D=D)
    if config.init == 'real': arrays = {k: v for k, v in arrays.items() if k not in ('frequency', 'B_imag', 'C_imag')}
    return {k: torch.tensor(v, dtype=torch.get_default_dtype()) for k, v in arrays.items()}


def to_real(
    h: Tensor, # complex [..., P], or real [..., N]
) -> Tensor: # real [..., 2P]: real and imaginary parts interleaved; or [..., N]
    "A state as the real numbers that it consists of."
    return torch.view_as_real(h).flatten(-2) if h.is_complex() else h


class Discretised:
    "The discrete-time layer, computed once: h_t = A_bar h_{t-1} + B_bar u_t, y_t = 2 Re(C h_t) + D u_t (without the 2 Re for real modes)."

    def __init__(self,
                 A_bar: Tensor, # complex [P], or [M, P]; real for real modes
                 W_in: Tensor, # [2P, D], or [M, 2P, D]: B_bar, real and imaginary rows interleaved; [P, D] for real modes
                 W_out: Tensor, # [H, 2P], or [M, H, 2P]: 2 Re(C) and -2 Im(C), interleaved; [H, P] for real modes
                 D: Tensor): # [H, D], or [M, H, D]
        self.A_bar, self.W_in, self.W_out, self.D = A_bar, W_in, W_out, D

    @property
    def B_bar(self) -> Tensor: # [P, D], or [M, P, D]
        "The discrete input matrix, complex unless the modes are real."
        if not self.A_bar.is_complex(): return self.W_in
        return torch.view_as_complex(self.W_in.unflatten(-2, (-1, 2)).movedim(-2, -1).contiguous())

    def drive(self, u):  # B_bar u, [..., P]
        x = linear(u, self.W_in)
        return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if self.A_bar.is_complex() else x

    def readout(self, h, u):  # y, real [..., H]
        return linear(to_real(h), self.W_out) + linear(u, self.D)

    def decay(self, n):  # A_bar with n middle dimensions, so that it broadcasts against [M, ..., P]
        return self.A_bar.reshape(*self.A_bar.shape[:-1], *[1] * n, self.A_bar.shape[-1])

    def __call__(self,
                 u: Tensor, # one input, [B, D]; with stacked parameters [M, K, D]
                 state: Tensor, # [B, P], or [M, K, P]
                 reset: Tensor = None, # bool [B], or [M, K]; True: forget the state before this step
                ) -> tuple: # y [..., H], next state [..., P]
        "One step of the recurrence. Raises ValueError for a reset that is not one flag for each sequence."
        _check_reset(reset, u.shape[:-1])
        if reset is not None: state = state.masked_fill(reset.unsqueeze(-1), 0)
        h = torch.addcmul(self.drive(u), self.decay(u.dim() - self.A_bar.dim()), state)
        return self.readout(h, u), h

    def states(self,
               u: Tensor, # [..., T, D]
               state: Tensor, # before the first step, [..., P]
               reset: Tensor = None, # bool [..., T]; True: forget the state before this step
              ) -> Tensor: # [..., T, P]
        "The state after every step."
        return scan(self.decay(u.dim() - self.A_bar.dim()), self.drive(u), state, reset)


def eigenvalues(
    params: dict, # of a layer, each value [...] or stacked [M, ...]
) -> Tensor: # lam [P], or [M, P]; complex if the layer has frequencies
    "Diagonal of the continuous A. The real part is -exp(log_decay): negative, whatever number training writes there."
    decay = -params['log_decay'].exp()
    return torch.complex(decay, params['frequency']) if 'frequency' in params else decay


def discretise(
    params: dict, # of a layer, each value [...] or stacked [M, ...]
) -> Discretised: # the discrete-time layer
    "Zero-order hold: A_bar = exp(A dt), B_bar = dt phi1(A dt) B."
    dt = params['log_dt'].exp()
    x = eigenvalues(params) * dt
    gain = (dt * phi1(x)).unsqueeze(-1)
    if not x.is_complex(): return Discretised(x.exp(), gain * params['B_real'], params['C_real'], params['D'])
    B_bar = gain * torch.complex(params['B_real'], params['B_imag'])
    W_in = torch.view_as_real(B_bar).movedim(-1, -2).flatten(-3, -2)
    W_out = torch.stack([2 * params['C_real'], -2 * params['C_imag']], -1).flatten(-2)
    return Discretised(x.exp(), W_in, W_out, params['D'])


def write_npz(
    path, # of the file; its folder is made if need be
    header: dict, # what JSON can hold: format, format_version, config
    arrays: dict, # name -> NumPy array
):
    "Write arrays and a JSON header as .npz, atomically: a reader sees the old file or the new one, never half of one."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:  # beside the target: os.replace is atomic on one file system only
        temp = Path(folder) / path.name
        with open(temp, 'wb') as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
            file.flush(), os.fsync(file.fileno())
        os.replace(temp, path)


def read_npz(
    path, # of a file that `write_npz` wrote
    format: str, # what the header must say it holds
    version: int, # newest format_version that the caller understands
) -> tuple: # header, arrays
    "Read a file without running anything in it (no pickle). Raises ValueError, in one line, if it is missing, damaged, of another format, or newer."
    try:
        with np.load(path, allow_pickle=False) as file: arrays = {k: file[k] for k in file.files}
        header = json.loads(str(arrays.pop('header')))
        found, written = header['format'], header['format_version']
    except FileNotFoundError: raise ValueError(f'{path} does not exist; check the path') from None
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise ValueError(f'{path} is not a {format} file, or is damaged ({type(error).__name__}); write it again') from error
    if found != format: raise ValueError(f'{path} holds {found!r}; expected {format!r}')
    if written > version: raise ValueError(f'{path} has format_version {written}; this version of ssm_metarl reads up to {version}, update it')
    return header, arrays


class SSM(nn.Module):
    "A diagonal, multi-input multi-output state space layer (in the line of S5, Smith et al., ICLR 2023): a module around functions of a flat dict of parameters."

    format, format_version = 'ssm_metarl.SSM', 1

    def __init__(self,
                 config: SSMConfig, # sizes and initialisation
                 seed: int = 0): # seed of the initial parameters
        super().__init__()
        self.config = config
        for name, value in initial_parameters(config, seed).items(): self.register_parameter(name, nn.Parameter(value))

    def init_parameters(self,
                        seed: int): # seed; the same seed gives the same parameters
        "Draw all parameters afresh."
        self.set_parameters(initial_parameters(self.config, seed))

    def get_parameters(self) -> dict: # name -> NumPy array, copies
        "All parameters."
        return {k: v.detach().cpu().numpy().copy() for k, v in self.named_parameters()}

    def set_parameters(self,
                       values: dict): # name -> array or tensor, all of them
        "Overwrite all parameters. Raises ValueError if a name or a shape does not fit; then nothing was changed."
        own = dict(self.named_parameters())
        if own.keys() != values.keys(): raise ValueError(f'parameters {sorted(values)} given; this model has {sorted(own)}')
        for k, v in values.items():
            if tuple(v.shape) != tuple(own[k].shape): raise ValueError(f'{k} is {list(v.shape)}; this model needs {list(own[k].shape)}')
        with torch.no_grad():
            for k, v in values.items(): own[k].copy_(torch.as_tensor(v))

    A = property(lambda self: eigenvalues(dict(self.named_parameters())), doc='Diagonal of the continuous state matrix, [P].')
    B = property(lambda self: torch.complex(self.B_real, self.B_imag) if hasattr(self, 'B_imag') else self.B_real, doc='Continuous input matrix, [P, D].')
    C = property(lambda self: torch.complex(self.C_real, self.C_imag) if hasattr(self, 'C_imag') else self.C_real, doc='Output matrix, [H, P].')
    dt = property(lambda self: self.log_dt.exp(), doc='Step sizes, [P].')
    A_bar = property(lambda self: self.stepper().A_bar, doc='Diagonal of the discrete state matrix, [P].')
    B_bar = property(lambda self: self.stepper().B_bar, doc='Discrete input matrix, [P, D].')

    def initial_state(self, *shape) -> Tensor: # [*shape, P]; complex unless the modes are real
        "A zero state for `shape` sequences."
        dtype = self.D.dtype if self.config.init == 'real' else self.D.dtype.to_complex()
        return torch.zeros(*shape, self.config.modes, dtype=dtype, device=self.D.device)

    def stepper(self,
                params: dict = None, # flat dict, each value [...] or stacked [M, ...]; None: the module's own
               ) -> Discretised: # `y, state = stepper(u, state, reset)`
        "The discretised layer, for many steps under the same parameters: make a new one when they change."
        return discretise(dict(self.named_parameters()) if params is None else params)

    def functional(self,
                   params: dict, # flat dict, each value [...] or stacked [M, ...]
                   u: Tensor, # inputs, [..., T, D]; [M, ..., T, D] when stacked
                   state: Tensor = None, # before the first step, [..., P]; None: zero
                   reset: Tensor = None, # bool [..., T]; True: forget the state before this step
                  ) -> tuple: # y [..., T, H], state after the last step [..., P]
        "Whole sequences under the given parameters: a pure function. Raises ValueError for shapes that do not fit."
        if u.dim() < 2 or u.shape[-1] != self.config.input_dim: raise ValueError(f'u is {list(u.shape)}; expected [..., T, {self.config.input_dim}]')
        if state is None: state = self.initial_state(*u.shape[:-2])
        step = self.stepper(params)
        h = step.states(u, state, reset)
        return step.readout(h, u), h[..., -1, :] if u.shape[-2] else state

    def forward(self,
                x: Tensor, # [B, T, D], or one step [B, D]
                state: Tensor = None, # before the first step, [B, P]; None: zero
                reset: Tensor = None, # bool [B, T], or [B]; True: forget the state before this step
               ) -> tuple: # y [B, T, H] or [B, H], state after the last step [B, P]
        "The module's own parameters on a batch of sequences, or of single steps. Raises ValueError for shapes that do not fit."
        if x.dim() not in (2, 3) or x.shape[-1] != self.config.input_dim:
            raise ValueError(f'x is {list(x.shape)}; expected [B, T, {self.config.input_dim}] or one step [B, {self.config.input_dim}]')
        if x.dim() == 3: return self.functional(dict(self.named_parameters()), x, state, reset)
        return self.stepper()(x, self.initial_state(len(x)) if state is None else state, reset)

    def extract_features(self,
                         x: Tensor, # [B, T, D]
                         state: Tensor = None, # before the first step, [B, P]; None: zero
                         reset: Tensor = None, # bool [B, T]; True: forget the state before this step
                        ) -> Tensor: # real [B, T, state_dim]
        "The state after every step as real numbers: what test-time adaptation monitors."
        return to_real(self.stepper().states(x, self.initial_state(len(x)) if state is None else state, reset))

    def save(self,
             path): # of the .npz file
        "Write config and parameters, atomically."
        write_npz(path, dict(format=self.format, format_version=self.format_version, config=asdict(self.config)), self.get_parameters())

    @classmethod
    def load(cls,
             path): # of a file that `save` wrote
        "A layer as it was saved. Raises ValueError, in one line, for a file that is missing, damaged, of another format, or newer."
        header, values = read_npz(path, cls.format, cls.format_version)
        try:
            ssm = cls(SSMConfig(**header['config'])).to(torch.from_numpy(values['D']).dtype)
            ssm.set_parameters(values)
        except (KeyError, TypeError, ValueError) as error: raise ValueError(f'{path} does not describe a layer: {error}') from error
        return ssm


def _self_check() -> int: # exit status
    "What a reader can check anywhere with `python -m ssm_metarl.ssm`: one line for each thing."
    ssm, x = SSM(SSMConfig(3, 8, 2)), torch.linspace(-1, 1, 4 * 10 * 3).view(4, 10, 3)
    y, state = ssm(x)

    def forward(): return y.shape == (4, 10, 2) and state.shape == (4, 4) and y.isfinite().all()

    def sequence():
        step, h, ys = ssm.stepper(), ssm.initial_state(4), []
        for u in x.unbind(1):
            y_t, h = step(u, h)
            ys.append(y_t)
        return torch.allclose(torch.stack(ys, 1), y, atol=1e-5) and torch.allclose(h, state, atol=1e-5)

    def persistence():
        first, h = ssm(x[:, :6])
        reset = torch.arange(4).expand(4, 4) == 0
        return torch.allclose(ssm(x[:, 6:], h)[0], y[:, 6:], atol=1e-5) and torch.equal(ssm(x[:, 6:], h * torch.inf, reset)[0], ssm(x[:, 6:])[0])

    def files():
        with tempfile.TemporaryDirectory() as folder:
            ssm.save(Path(folder) / 'ssm.npz')
            return torch.equal(SSM.load(Path(folder) / 'ssm.npz')(x)[0], y)

    def parameters():
        other = SSM(ssm.config, seed=1)
        other.set_parameters(ssm.get_parameters())
        return torch.equal(other(x)[0], y) and not torch.equal(SSM(ssm.config, seed=1)(x)[0], y)

    checks = {'initialization and forward pass': forward, 'sequence processing: step by step equals whole': sequence,
              'state persistence and reset': persistence, 'save and load': files, 'parameter access and modification': parameters}
    results = {name: bool(check()) for name, check in checks.items()}
    for name, passed in results.items(): print(f'{"ok" if passed else "FAILED":7}{name}')
    return int(not all(results.values()))


if __name__ == '__main__' and '__file__' in globals(): raise SystemExit(_self_check())
