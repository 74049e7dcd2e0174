"""The comparison that a task with a new head needs: how good is the head alone, on the untouched base?"""

from __future__ import annotations

from inlay.train.defaults import BASELINE_STEPS, defaults, width_of
from inlay.train.evaluate import Evaluator
from inlay.train.loop import Loop
from inlay.train.progress import Display
from inlay.train.session import Session, attach_new, seed_everything

BASELINE_NAME = "headonly"


def head_only(session: Session, evaluator: Evaluator, main: Loop) -> dict[str, float]:
    """Train the task head alone on the same batches for the same steps (at most `BASELINE_STEPS`), and measure it.

    It has its own learning rate (`defaults.py`) and nothing of it is kept; the model is left as it was.
    """
    import inlay

    chosen = defaults(BASELINE_NAME, session.task, width_of(session.model.config))
    steps = min(main.total_steps, BASELINE_STEPS)
    config = session.config.model_copy(
        update={
            "max_steps": steps,
            "learning_rate": session.config.head_learning_rate or chosen.learning_rate,
            "lr_scheduler_type": chosen.lr_scheduler_type,
            "lr_scheduler_kwargs": {},
            "warmup_ratio": chosen.warmup_ratio,
            "warmup_steps": None,
            "weight_decay": chosen.weight_decay,
            "loraplus_lr_ratio": None,
            "optim": "adamw_torch_fused",
            "logging_steps": steps,
            "eval_steps": None,
            "save_steps": None,
        }
    )
    seed_everything(config.seed)
    active: list[str] = list(inlay.adapters(session.model))
    adapter = attach_new(session, inlay.HeadOnly(), "head-only")
    try:
        display = Display(main.display.console, steps, quiet=not main.display.live)
        loop = Loop(
            model=session.model,
            adapter=adapter,
            config=config,
            train=session.train_batches,
            origin=session.prepared.train.origin,
            tokens=lambda index: int(session.prepared.train.lengths[index]),
            evaluate=None,
            accelerator=session.accelerator,
            display=display,
        )
        with display:
            loop.fit()
        session.model.eval()
        return next(iter(evaluator.measure_all().values()))
    finally:
        adapter.detach()
        inlay.use(session.model, tuple(active))
