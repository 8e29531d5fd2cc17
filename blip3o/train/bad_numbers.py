"""A step whose loss or gradient is infinite or NaN: what is wrong with it, and in which samples."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blip3o.train.batch import Batch
from blip3o.train.devices import Devices


def suspects(
    batches: list[Batch], losses: list[Tensor], parameters: Mapping[str, nn.Parameter], devices: Devices
) -> tuple[str, list[str]]:
    """What holds a bad number, and the ids of the samples it may come from; the same on every process.

    The first of these that there is, on any process: data of micro-batches; losses of micro-batches; gradients, whose
    samples are all of the step's.
    """
    data = [
        (name, batch)
        for batch in batches
        for name, x in batch.tensors().items()
        if x.is_floating_point() and not x.isfinite().all()
    ]
    lost = [batch for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
    gradients = [name for name, x in parameters.items() if x.grad is not None and not _finite(x.grad)]
    for what, names, own in (
        ("data", [name for name, _ in data], [batch for _, batch in data]),
        ("loss", [], lost),
        ("gradient of", gradients[:1], batches),
    ):
        found = devices.gather([names, list(dict.fromkeys(one for batch in own for one in batch.ids))])
        every = list(dict.fromkeys(name for some, _ in found for name in some))
        ids = [one for _, some in found for one in some]
        if ids and (every or what == "loss"):
            return " ".join([what, *every]), ids
    return "gradient norm", [one for found in devices.gather([one for b in batches for one in b.ids]) for one in found]


def _finite(gradient: Tensor) -> bool:
    local: Tensor = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(local.isfinite().all())
