"""DeepSpeed's configuration of an engine: what it is told, and what it must leave to us.

    stage, precision, sizes of the local tensors --ds_config()--> the JSON of deepspeed.initialize

Clipping, the loss scale of accumulation and the boundaries of a step are ours
(pretrain/optimizers/update.py, pretrain/engine.py); the buffers are those that `plan` counts
(pretrain/transient.py).
"""

from typing import Any

from pretrain.transient import BUCKET, bucket_values


def quiet(zero: int, precision: str) -> bool:
    """Whether our update judges gradients, on the device, and DeepSpeed does not.

    Where it cannot be told not to, under ZeRO 3, in ZeRO 1 for bf16 and with a loss scaler, it
    does, and waits for the device at every update.
    """
    noisy = zero == 3 or (zero == 1 and precision == "bf16")
    return not noisy and precision != "fp16"


def ds_config(
    zero: int, precision: str, sizes: list[int], hidden: int, device: str, overlap: bool | None
) -> dict[str, Any]:
    """The JSON for ZeRO stage `zero`, as the engine runs it.

    sizes: values of each tensor on this device, unpartitioned; overlap: the page's
    parallel.overlap.
    """
    most = BUCKET.get(device, BUCKET["cuda"])
    bucket = bucket_values(sizes, zero, device)
    judges = quiet(zero, precision)
    return {
        # We scale the loss and set the boundaries of accumulation ourselves.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "gradient_clipping": 0.0,  # ours, by tensor: pretrain/optimizers/update.py
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            # ours, and without waiting for the device: pretrain/optimizers/update.py
            "compute_grad_norm": not judges or zero == 0,
            "overlap_comm": overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * ((most + 1) // 2),
            # Whole under ZeRO 3: the largest matrix in use, and as much fetched ahead of it. Left
            # out, a thousand million values stay whole that are soon used again.
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_param_persistence_threshold": 10 * hidden,
            "memory_efficient_linear": False,  # it would replace F.linear for the whole process
        },
        "bf16": {
            "enabled": precision == "bf16",
            "check_grad_overflow": not judges,
            # a gradient goes into the fp32 sums and is given back as soon as it is there: else all
            # of them stand beside the sums until the update, 2 bytes a parameter
            "immediate_grad_update": zero == 1,
        },
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device every step
    }
