"""The forward process q: noising, its posterior, and the relations between x_0, x_t, eps and v.

Tables are gathered from float64 into the images' own precision, float32 in training (float64 is taken as
it is, for tests). Half precision is refused: in bfloat16 the first ten timesteps would add no noise at all
and a thousand noise levels would collapse to 190. Autocast does not touch any operation used here.

Equation numbers are of Ho et al. 2020 (arXiv 2006.11239v2). All formulae stay finite where abar_t = 0,
except that of x_0 from eps, which does not exist there.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from trainer.diffusion.schedule import Schedule, Table


class ForwardProcess:
    """q of one schedule.

    In all methods images are float32 [B, ...], x_0 in [-1, 1], and t is int64 [B] in [0, T). Every method
    raises ValueError on wrong shapes, precision or timesteps.

    Attributes:
        schedule: The tables.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._tables: dict[tuple[Hashable, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.schedule.num_timesteps

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0) (eq. 4).

        Args:
            x0: float32 [B, ...] clean images.
            t: int64 [B] timesteps.
            noise: Standard normal, like x0.

        Returns:
            x_t, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x0, t)
        check_like("noise", noise, x0)
        signal = self.gather("sqrt_alphas_cumprod", t, x0)
        sigma = self.gather("sqrt_one_minus_alphas_cumprod", t, x0)
        return signal * x0 + sigma * noise

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (eq. 7); at t = 0 it is x_0.

        Args:
            x0: float32 [B, ...] clean images, or an estimate of them.
            x_t: Noisy images, like x0.
            t: int64 [B] timesteps.

        Returns:
            The mean, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        check_like("x0", x0, x_t)
        weight_x0 = self.gather("posterior_mean_coef_x0", t, x_t)
        return weight_x0 * x0 + self.gather("posterior_mean_coef_xt", t, x_t) * x_t

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from x_0 to x_t (eq. 4 solved for eps).

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            x0: Clean images, like x_t.

        Returns:
            eps, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        check_like("x0", x0, x_t)
        signal = self.gather("sqrt_alphas_cumprod", t, x_t)
        return (x_t - signal * x0) / self.gather("sqrt_one_minus_alphas_cumprod", t, x_t)

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean image that eps would lead away from (eq. 15), not clipped.

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            eps: The noise, like x_t.

        Returns:
            x_0, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps; on a CPU also where abar_t = 0: pure noise
                holds no x_0.
        """
        self.check(x_t, t)
        check_like("eps", eps, x_t)
        if self.schedule.alphas_cumprod[-1] == 0 and t.device.type == "cpu":
            last = self.num_timesteps - 1
            if bool((t == last).any()):
                raise ValueError(f"x_0 cannot be told from eps at timestep {last}: abar is 0 there")
        recip = self.gather("sqrt_recip_alphas_cumprod", t, x_t)
        return recip * x_t - self.gather("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def v_from(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, section 4).

        Args:
            x0: float32 [B, ...] clean images.
            t: int64 [B] timesteps.
            noise: The noise, like x0.

        Returns:
            v, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x0, t)
        check_like("noise", noise, x0)
        signal = self.gather("sqrt_alphas_cumprod", t, x0)
        return signal * noise - self.gather("sqrt_one_minus_alphas_cumprod", t, x0) * x0

    def x0_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans & Ho 2022, section 4), not clipped.

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            v: The velocity, like x_t.

        Returns:
            x_0, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        check_like("v", v, x_t)
        signal = self.gather("sqrt_alphas_cumprod", t, x_t)
        return signal * x_t - self.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Noise eps = sqrt(1 - abar) x_t + sqrt(abar) v (Salimans & Ho 2022, section 4).

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            v: The velocity, like x_t.

        Returns:
            eps, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        check_like("v", v, x_t)
        sigma = self.gather("sqrt_one_minus_alphas_cumprod", t, x_t)
        return sigma * x_t + self.gather("sqrt_alphas_cumprod", t, x_t) * v

    def gather(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A table's values at t, shaped to go with images.

        Args:
            name: A table or view of the schedule, e.g. "betas" or "snr".
            t: int64 [B] timesteps.
            like: Images whose precision, device and number of axes the values get.

        Returns:
            [B, 1, ...], broadcastable to `like`.
        """
        return self.lookup(name, lambda: getattr(self.schedule, name), t, like)

    def lookup(self, key: Hashable, make: Callable[[], Table], t: Tensor, like: Tensor) -> Tensor:
        """Like `gather`, of a table made on first use and kept under `key`.

        Args:
            key: Names the table among all tables looked up here.
            make: Returns the table, float64 [T].
            t: int64 [B] timesteps.
            like: Images whose precision, device and number of axes the values get.

        Returns:
            [B, 1, ...], broadcastable to `like`.
        """
        where = (key, like.device, like.dtype)
        if where not in self._tables:
            table = torch.tensor(make(), dtype=like.dtype, device="cpu")
            self._tables[where] = table.to(like.device)
        # index_select, unlike indexing, does not take a negative timestep for one counted from the end.
        return self._tables[where].index_select(0, t).view(-1, *[1] * (like.ndim - 1))

    def check(self, x: Tensor, t: Tensor) -> None:
        """Demands that t holds one timestep for each image of x in full precision.

        Args:
            x: The images.
            t: The timesteps.

        Raises:
            ValueError: If it does not. Whether the timesteps are in range is looked at on a CPU only.
        """
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"diffusion is computed in float32, got images of {x.dtype}: use .float() on them"
            )
        if t.dtype != torch.int64 or x.ndim == 0 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be int64 of shape {list(x.shape[:1])}, got {t.dtype} {list(t.shape)}")
        # On an accelerator reading t would stop the pipeline; there index_select's own assertion guards.
        if t.device.type == "cpu" and t.numel():
            low, high = (int(bound) for bound in torch.aminmax(t))
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}), got {low}..{high}")


def check_like(name: str, x: Tensor, like: Tensor) -> None:
    """Demands that a tensor has the shape and precision of the images it goes with.

    Args:
        name: What the message calls the tensor.
        x: The tensor.
        like: The images.

    Raises:
        ValueError: If shape or precision differ.
    """
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, the images {list(like.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} is {x.dtype}, the images are {like.dtype}: convert it")
