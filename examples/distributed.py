"""Train the network of ``examples/images.py`` privately in several processes: the same script, and the same result.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --ddp

Shows that nothing has to be told but to join: the loader's ``batch_size`` is that of all processes together, the dataset is the
whole one, and one report counts. Takes about 20 seconds. Prints, once, how many processes there are, and the test accuracy, which
is that of one process up to rounding.

Data: 5,000 digits of MNIST, see ``examples/example_data.py``. With ``--ddp`` the model is in ``DistributedDataParallel``.
"""

import time

import torch
import torch.distributed as dist
from example_data import split_digits
from example_training import DELTA, accuracy, settings_of, settings_parser, train_privately, train_step
from images import PRIVATE, build_model
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Join the other processes, if torchrun has started any, and train."""
    parser = settings_parser(__doc__, PRIVATE)
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    parser.add_argument("--ddp", action="store_true", help="put the model into DistributedDataParallel")
    args, begun = parser.parse_args(), time.perf_counter()
    joins = dist.is_torchelastic_launched()
    if joins:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.ddp and size == 1:
        parser.error("--ddp needs several processes: torchrun --nproc-per-node 2 examples/distributed.py --ddp")
    data, (images, labels) = split_digits(args.examples)
    model = build_model()
    trained = DistributedDataParallel(model) if args.ddp else model
    spent = train_privately(trained, data, settings_of(args), args.epsilon, train_step)
    if rank == 0:
        print(f"{size} process{'es' if size > 1 else ''}, {len(data)} images to train on, {len(labels)} to test with")
        print(f"with epsilon {spent:.2f}, delta {DELTA:g}: test accuracy {accuracy(model, images, labels):.3f}")
        print(f"{time.perf_counter() - begun:.0f} seconds in all")
    if joins:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
