"""Ways in which freezing goes wrong in the wild, each from a public thread.

PL is Lightning-AI/pytorch-lightning, PT pytorch/pytorch, HF huggingface/transformers, PEFT
huggingface/peft, DS deepspeedai/DeepSpeed, FTS speediedan/finetuning-scheduler.
"""

from __future__ import annotations

from typing import NamedTuple


class Failure(NamedTuple):
    """Where it was reported, and what happened there."""

    source: str
    symptom: str


FAILURES = {
    "F1": Failure(
        "KellerJordan/Muon#54",
        "decoupled decay applied even with grad None (`p.grad = zeros`, then `p.mul_(1-lr*wd)`)",
    ),
    "F2": Failure(
        "huggingface/diffusers#1009",
        '"frozen" embedding rows drift: zeroed grads still get weight decay',
    ),
    "F3": Failure(
        "PT#28294, PT#41101", "DDP hands unused params zero grads, so decay and momentum act"
    ),
    "F4": Failure("discuss.pytorch.org 153740", "re-frozen layer drifts on its stale `.grad`"),
    "F5": Failure("neuralmagic/sparseml#965", "flag set between backward and step"),
    "F6": Failure("forum threads", "zeroed grads still move weights through Adam/momentum state"),
    "F8": Failure(
        "open-mmlab/mmdetection#8210",
        "`lr_mult=0` is not a freeze: norm statistics and decay still act",
    ),
    "F9": Failure("PL#712", "the trainer itself set `requires_grad=True`"),
    "F10": Failure("PL#5292", "`toggle_optimizer` turned user-frozen params on"),
    "F11": Failure(
        "ultralytics/yolov5#1213", "another part of the program turns the layers back on"
    ),
    "F12": Failure(
        "HF#11903, HF#31467", "freezing the embedding freezes the tied head, or the other way round"
    ),
    "F13": Failure(
        "kohjingyu/fromage#18", "`resize_token_embeddings` returns new, trainable tensors"
    ),
    "F14": Failure("PEFT#3447", "leaving a context manager unfreezes adapters"),
    "F15": Failure("PEFT#3580, #1374", "loading a second adapter flips which one trains"),
    "F16": Failure("PT#22569", "SyncBatchNorm conversion turns all flags on"),
    "F17": Failure("PT#171709", "a tensor-parallel re-wrap makes frozen params trainable"),
    "F18": Failure(
        "PT#121157, PT#188166",
        "`load_state_dict(assign=True)` replaces Parameters and drops the flag",
    ),
    "F19": Failure("HF#11294", "a resume re-instantiates the model; the freeze is lost"),
    "F20": Failure("PL#7930", "parameters owned by parent (non-leaf) modules are missed"),
    "F21": Failure("Lightning-Universe/lightning-flash#1080", "a freeze strategy froze nothing"),
    "F22": Failure("roboflow/rf-detr#357", "a freeze option is read once and ignored later"),
    "F23": Failure(
        "haotian-liu/LLaVA#1647", "new trainable tensors appear inside the frozen tower"
    ),
    "F24": Failure("facebookresearch/fairscale#721", "a flat parameter ignores the original flags"),
    "F25": Failure("PT#8208", "spectral norm's `u` moves"),
    "F26": Failure(
        "openvinotoolkit/nncf#1309",
        "`.weight` looks frozen, the weight-norm `g`/`v` behind it train",
    ),
    "F27": Failure("pytorch/ignite#2590", "an averaged copy differs from the frozen source"),
    "M1": Failure(
        "PL#15062, PL#21531",
        "BatchNorm statistics move although frozen; `train_bn=False` ignored while frozen",
    ),
    "M2": Failure(
        "FTS#13",
        "`track_running_stats=False` trains on batch statistics and validates on stale buffers: never use it",
    ),
    "M3": Failure("PL#2551, PL#18930", "the end of validation calls `train()` on frozen parts"),
    "M4": Failure(
        "PL#20986",
        "a model left in eval stays in eval for the whole fit (`from_pretrained` returns eval mode!)",
    ),
    "M5": Failure("pgniewko/gt-pyg#112", "a one-shot `eval()` is undone later"),
    "M6": Failure("idstcv/SoftTriple#4", "BatchNorm in eval but its affine weights still train"),
    "M8": Failure("PT#111998", "SyncBatchNorm conversion loses the training flag"),
    "M9": Failure("PT#63916", "a reassigned buffer escapes DDP's sync"),
    "U1": Failure(
        "PL#20340 (open)",
        "ranks diverge silently after an unfreeze: DDP's reducer collects only params with `requires_grad` at construction",
    ),
    "U2": Failure("PT#139476", "a compiled graph is reused after a flag flip"),
    "U3": Failure(
        "luxonis/luxonis-train#432",
        "unfrozen params are in no optimizer; a cached group dict is orphaned by a restore",
    ),
    "U4": Failure("facebookresearch/mmf#104", "new layers never registered with the optimizer"),
    "U5": Failure("PT#14467", "the optimizer holds old or meta params"),
    "U6": Failure(
        "DS#1767", "the unfrozen part doesn't learn under DeepSpeed (probably excluded at init)"
    ),
    "U7": Failure(
        "HF#23170, HF#26221", "reentrant gradient checkpointing with frozen inputs: all grads None"
    ),
    "U9": Failure("haotian-liu/LLaVA#1173", "a tower's forward runs under `torch.no_grad()`"),
    "U10": Failure("huggingface/trl#1936", "a trainable layer's output is never used"),
    "U11": Failure("PEFT#282, huggingface/trl#4081", "everything ends up frozen"),
    "U12": Failure("modelscope/ms-swift#9452", "the first checkpoint save freezes the adapter"),
    "U15": Failure(
        "open-mmlab/mmsegmentation#2447",
        "a `train()` override freezes again on each call and undoes an unfreeze",
    ),
    "U16": Failure("PT#79888, HF#20029", "the scheduler ignores an added group: its lr stays flat"),
    "U17": Failure("PL#12141, PL#8720", "ReduceLROnPlateau raises IndexError after an unfreeze"),
    "U18": Failure(
        "Lightning-Universe/lightning-flash#1321", "OneCycleLR raises at the unfreeze epoch"
    ),
    "U19": Failure("pytorch/vision#2164, #3394", "models ship with parts frozen by default"),
    "U20": Failure("PT#715", "modules in a plain list are never registered"),
    "U22": Failure("PT#69031", "with accumulation only the last micro-batch's used params sync"),
    "U23": Failure(
        "GOF_NeurIPS2021#2", '"No inf checks were recorded": all grads None under mixed precision'
    ),
    "U24": Failure("PT#45326", "DDP refuses a module without any trainable parameter"),
    "R1": Failure("PL#6891, PL#8502", '"different number of parameter groups"'),
    "R2": Failure(
        "PL#21901 (open)",
        "a resume re-freezes what was unfrozen while the LR monitor still shows an lr",
    ),
    "R3": Failure("FTS#30, FTS#4", "a param appears in more than one group"),
    "R4": Failure("STVIR/pysot#92", "resuming in another phase fails"),
    "R5": Failure("PT#192307", "the state of params trained, then frozen, is dropped"),
    "R6": Failure(
        "measured on FTS 2.14.1",
        "`fit(ckpt_path=...)` resumes one phase late without a word; only the `trainer.ckpt_path` attribute is read",
    ),
    "C1": Failure("axolotl-ai-cloud/axolotl#1464", "a shipped example's patterns match nothing"),
    "C2": Failure("espnet/espnet#1983", "a `module.` prefix defeats the list"),
    "C3": Failure("hiyouga/LlamaFactory#5032", "a tied head is absent from `named_parameters()`"),
    "C4": Failure("allenai/OLMo-core#219", "an optimizer-group pattern matches only frozen params"),
    "C6": Failure("BINE022/EEGPT#18", "frozen only by omission from the optimizer"),
    "C7": Failure(
        "ultralytics/ultralytics#16013", '"missing" layers that simply have no parameters'
    ),
    "C9": Failure("PL#21513", "`toggle_optimizer` KeyError on a compiled module"),
    "C10": Failure("PT#104690", "FSDP1 wants one `requires_grad` per flat param"),
    "C11": Failure(
        "measured on FTS 2.14.1, LlamaFactory source",
        "`layer.1` also matches layer 10 and 11; `.1.` also matches `experts.1.`",
    ),
    "I1": Failure("HF#46620", "loaded weights silently randomised again"),
    "I2": Failure("HF#17370, HF#42418", "a custom init is overwritten later"),
    "I3": Failure("HF#28298", "a layer left all zeros"),
    "I5": Failure("NVIDIA-NeMo/Automodel#2213", "FSDP2 or meta init breaks the embedding tie"),
    "I6": Failure("HF#171", "LayerNorm not set to ones and zeros"),
    "I7": Failure("open-mmlab/mmsegmentation#1069", "an init helper is a silent no-op"),
    "I8": Failure(
        "facebookresearch/detr#544", "each rank re-initialises with its own seed after the wrap"
    ),
    "I9": Failure("pytorch/torchtitan#1777", "FSDP2 doesn't sync module states"),
    "I11": Failure("PT#37410", "stale moments after a re-init"),
    "I12": Failure("PL#7535", "a re-init runs again on resume and wipes the training"),
    "I13": Failure(
        "measured on transformers 5.23.0",
        "`_init_weights`, `_initialize_weights` and `init_weights` are silent no-ops on loaded weights (`_is_hf_initialized` flags)",
    ),
}
