"""Programs that hold an ``nn.LSTM``, each trained for a few steps on numbers made here.

A program is a function of ``prepare``, which it calls with its model as soon as that is built; it
returns numbers that depend on every step. Nothing is downloaded. ``__main__.py`` runs them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Prepare = Callable[[nn.Module], object]
Run = Callable[[Prepare], list[float]]


@dataclass(frozen=True)
class Program:
    """How it is run, what pip installs for it, and the advice of the compatibility page."""

    run: Run
    packages: tuple[str, ...]  # the first names the version
    advice: str = ""


PROGRAMS: dict[str, Program] = {}


def program(title: str, *packages: str, advice: str = "") -> Callable[[Run], Run]:
    """Put a function into ``PROGRAMS``."""

    def register(run: Run) -> Run:
        PROGRAMS[title] = Program(run, packages, advice)
        return run

    return register


class Net(nn.Module):
    """``[B, T, 3]`` to ``[B, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


def data(count: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(0))
    return x, x.sum((1, 2)).unsqueeze(1)


def sums(model: nn.Module) -> list[float]:
    """Numbers that depend on every step of training."""
    return [p.detach().double().abs().sum().item() for p in model.parameters()]


@program("Lightning", "lightning")
def lightning(prepare: Prepare) -> list[float]:
    from lightning import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader, TensorDataset

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    seed_everything(0)
    task = Task()
    prepare(task)
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    trainer = Trainer(max_epochs=2, accelerator="cpu", **QUIET)
    trainer.fit(task, loader)
    return [*sums(task), torch.cat(trainer.predict(task, loader)).sum().item()]


QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


@program("skorch", "skorch", advice="`replace` in `initialize_module` of a subclass")
def skorch(prepare: Prepare) -> list[float]:
    from skorch import NeuralNetRegressor

    class Regressor(NeuralNetRegressor):
        def initialize_module(self) -> Any:
            super().initialize_module()
            prepare(self.module_)
            return self

    torch.manual_seed(0)
    x, y = data()
    net = Regressor(Net, max_epochs=3, lr=0.1, verbose=0, train_split=None)
    net.fit(x.numpy(), y.numpy())
    return [*net.history[:, "train_loss"], float(net.predict(x.numpy()).sum())]


@program(
    "Hugging Face Trainer, save and reload", "transformers[torch]",
    advice="`replace` again after `from_pretrained`; `_init_weights` as below",
)  # fmt: skip
def hugging_face(prepare: Prepare) -> list[float]:
    from torch.utils.data import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
    from transformers.modeling_outputs import SequenceClassifierOutput

    import throughtime

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig, more: bool = False) -> None:
            super().__init__(config)
            self.net = Net()
            if more:
                self.extra = nn.LSTM(3, 4)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.LSTM, throughtime.LSTM)):
                module.reset_parameters()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            out = self.net(x)
            loss = None if labels is None else nn.functional.mse_loss(out, labels)
            return SequenceClassifierOutput(loss=loss, logits=out)

    class Rows(Dataset[Any]):
        x, y = data()

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, k: int) -> dict[str, Tensor]:
            return {"x": self.x[k], "labels": self.y[k]}

    torch.manual_seed(0)
    model = Model(PretrainedConfig())
    prepare(model)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
            logging_strategy="no", save_strategy="no", disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        loss = Trainer(model, options, train_dataset=Rows()).train().training_loss
        model.save_pretrained(folder)
        again = Model.from_pretrained(folder, more=True)
    prepare(again)
    assert all(p.abs().max() < 1 for p in again.extra.parameters()), "not initialised"
    x, _ = data()
    assert torch.allclose(again.eval()(x).logits, model.eval()(x).logits, atol=1e-6)
    return [loss, *sums(model)]


@program("fastai AWD-LSTM", "fastai")
def fastai(prepare: Prepare) -> list[float]:
    from fastai.text.models.awdlstm import AWD_LSTM

    torch.manual_seed(0)
    model = AWD_LSTM(30, 8, 12, 2)
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses = []
    for _ in range(3):
        loss = model(torch.arange(24).view(2, 12)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, model.eval()(torch.arange(24).view(2, 12)).sum().item()]


@program(
    "pytorch-forecasting DeepAR", "pytorch-forecasting",
    advice="`accelerate`: its subclass of nn.LSTM has a forward of its own",
)  # fmt: skip
def forecasting(prepare: Prepare) -> list[float]:
    import numpy as np
    import pandas as pd
    from lightning import Trainer, seed_everything
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet

    steps = np.arange(60)
    frame = pd.concat(
        pd.DataFrame(
            {"time": steps, "series": str(k), "value": np.sin(steps / 5 + k).astype("float32")}
        )
        for k in range(3)
    ).reset_index(drop=True)
    dataset = TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["series"], max_encoder_length=12,
        max_prediction_length=4, time_varying_unknown_reals=["value"],
    )  # fmt: skip
    seed_everything(0)
    model = DeepAR.from_dataset(dataset, hidden_size=8, rnn_layers=2, learning_rate=0.01)
    prepare(model)
    loader = dataset.to_dataloader(train=True, batch_size=16, num_workers=0)
    Trainer(max_steps=5, accelerator="cpu", **QUIET).fit(model, loader)
    return sums(model)


@program("neuralforecast LSTM", "neuralforecast")
def neuralforecast(prepare: Prepare) -> list[float]:
    import numpy as np
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import LSTM

    days = pd.date_range("2020-01-01", periods=80, freq="D")
    frame = pd.DataFrame({"unique_id": "a", "ds": days, "y": np.sin(np.arange(80) / 5)})
    model = LSTM(h=4, input_size=16, max_steps=5, encoder_hidden_size=8, random_seed=0,
                 accelerator="cpu", **QUIET)  # fmt: skip
    prepare(model)
    forecast = NeuralForecast([model], freq="D")
    forecast.fit(frame)
    return [float(x) for x in forecast.predict()["LSTM"]]


@program(
    "sb3-contrib RecurrentPPO", "sb3-contrib",
    advice="`replace(model.policy)`, or `throughtime.integrations.sb3`: rows of steps in one call",
)  # fmt: skip
def recurrent_ppo(prepare: Prepare) -> list[float]:
    from sb3_contrib import RecurrentPPO

    model = RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu"
    )
    prepare(model.policy)
    model.learn(128)
    with tempfile.TemporaryDirectory() as folder:
        model.save(os.path.join(folder, "model"))
        again = RecurrentPPO.load(os.path.join(folder, "model"), device="cpu")
    return sums(again.policy)


@program(
    "torchrl LSTMModule", "torchrl",
    advice="`accelerate`, or `throughtime.integrations.torchrl`: `LSTMModule` asks for the class",
)  # fmt: skip
def torchrl(prepare: Prepare) -> list[float]:
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    torch.manual_seed(0)
    module = LSTMModule(
        lstm=nn.LSTM(3, 8, batch_first=True), in_keys=["x", "h", "c"],
        out_keys=["y", ("next", "h"), ("next", "c")],
    )  # fmt: skip
    prepare(module)
    x, _ = data()
    start = torch.zeros(32, 6, 1, dtype=torch.bool)
    start[:, 0] = start[3, 4] = True
    state = torch.zeros(32, 6, 1, 8)
    batch = {"x": x, "h": state, "c": state.clone(), "is_init": start}
    with set_recurrent_mode("recurrent"):
        result = module(TensorDict(batch, [32, 6]))
    result["y"].square().sum().backward()
    return [p.grad.double().abs().sum().item() for p in module.parameters()]


class OnlyOutput(nn.LSTM):
    """For Opacus, which differentiates modules that return one tensor."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@program(
    "Opacus, gradients by vmap", "opacus",
    advice="a subclass that returns the output alone; under vmap `accelerate` uses torch's kernels",
)  # fmt: skip
def opacus(prepare: Prepare) -> list[float]:
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(0)
    inner = OnlyOutput(3, 8, batch_first=True)
    prepare(inner)
    model = GradSampleModule(nn.Sequential(inner), force_functorch=True, batch_first=True)
    model(data()[0]).square().sum().backward()
    return [p.grad_sample.double().abs().sum().item() for p in model.parameters()]


@program("captum IntegratedGradients", "captum")
def captum(prepare: Prepare) -> list[float]:
    from captum.attr import IntegratedGradients

    torch.manual_seed(0)
    model = Net()
    prepare(model)
    found = IntegratedGradients(model).attribute(data()[0], target=0, n_steps=8)
    return [found.double().abs().sum().item()]


@program("AOTInductor", "torch", advice="a package of `accelerate` needs nothing of ours to load")
def aot_inductor(prepare: Prepare) -> list[float]:
    torch.manual_seed(0)
    model, (x, _) = Net().eval(), data()
    prepare(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = os.path.join(folder, "model.pt2")
        exported = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        loaded: Any = torch._inductor.aoti_load_package(path)
        return loaded(x).flatten().tolist()
