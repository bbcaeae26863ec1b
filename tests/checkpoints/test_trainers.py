"""Checkpoints that training libraries have written themselves, exported and held against the net that they trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
import torch
from helpers.library_nets import OPENMMLAB, Backbone, Official
from helpers.requests import make_request
from helpers.small_nets import randomize
from torch import Tensor, nn

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.checkpoints import attributes_of, load_checkpoint
from repvgg_deploy.workflows.export import export

Save = Callable[..., Path]
SIZE = 32


def exported(path: Path, images: Tensor, **options: Any) -> Tensor:
    """The logits of the graph that is exported from a checkpoint."""
    preprocessing = PreprocessingOptions(size=(SIZE, SIZE))
    result = export(make_request(path, path.parent / "out", preprocessing=preprocessing, **options))
    session = onnxruntime.InferenceSession(result.onnx)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def agree(logits: Tensor, net: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        expected = net.eval()(images)
    return bool((logits - expected).norm() < 1e-4 * expected.norm())


class Classifier(nn.Module):
    """A net with the names of OpenMMLab's: a backbone, and a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(OPENMMLAB)
        self.head = nn.ModuleDict({"fc": nn.Linear(24, 5)})
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.backbone(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("timm")
def test_checkpoint_of_mmengines_runner(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            inner = Classifier()
            self.backbone, self.head = inner.backbone, inner.head

        def forward(self, inputs: Any, mode: str = "tensor") -> Any:
            batch = torch.stack(inputs) if isinstance(inputs, list) else inputs
            logits = self.head["fc"](self.backbone(batch))
            return {"loss": logits.square().mean()} if mode == "loss" else logits

    data = [{"inputs": image} for image in images]
    sampler = {"type": "DefaultSampler", "shuffle": False}
    runner = Runner(
        model=Model(),
        work_dir=str(tmp_path / "work"),
        train_dataloader={"batch_size": 4, "dataset": data, "sampler": sampler},
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 1e-3}},
        custom_hooks=[{"type": "EMAHook"}],
        experiment_name="test",
    )
    runner.train()
    path = tmp_path / "work" / "epoch_1.pth"
    checkpoint = load_checkpoint(path, ema=False)
    assert any("HistoryBuffer" in note for note in checkpoint.notes)
    assert isinstance(attributes_of(checkpoint.configuration["meta"])["cfg"], str)
    assert agree(exported(path, images, ema=False), runner.model, images)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("timm")
@pytest.mark.slow
def test_checkpoint_of_lightnings_trainer(images: Tensor, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, cfg: Any, folder: Path, loss: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.folder = folder
            self.net = Official(cfg.classes)
            self.criterion = loss

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    loss = nn.CrossEntropyLoss(weight=torch.ones(5))
    module = Module(omegaconf.OmegaConf.create({"classes": 5, "lr": 0.1}), tmp_path, loss)
    loader = torch.utils.data.DataLoader([(image, 1) for image in images], batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = load_checkpoint(path)
    assert any("criterion.weight" in note and "left out" in note for note in checkpoint.notes)
    hyper = attributes_of(checkpoint.configuration["hyper_parameters"])
    assert set(attributes_of(hyper["cfg"])) == {"classes", "lr"}
    assert agree(exported(path, images), module.net, images)


@pytest.mark.exhaustive
def test_checkpoint_of_timms_saver(timm: ModuleType, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=7)
    randomize(model)
    average = timm.utils.ModelEmaV3(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(images).square().mean().backward()
    optimizer.step()
    saver = timm.utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="repvgg_a0", lr=0.1, where=tmp_path),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(1, 71.5)
    path = tmp_path / "last.pth.tar"
    assert attributes_of(load_checkpoint(path).configuration["args"])["model"] == "repvgg_a0"
    assert agree(exported(path, images), model, images)
    assert agree(exported(path, images, ema=True), average.module, images)


def test_checkpoint_of_the_official_trainer_with_its_yacs_configuration(images: Tensor, save: Save) -> None:
    yacs = pytest.importorskip("yacs.config", reason="yacs is not installed")
    net = Official()
    config = yacs.CfgNode({"MODEL": {"ARCH": "RepVGG-A0"}, "DATA": {"IMG_SIZE": 224}})
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(images).square().mean().backward()
    optimizer.step()
    value = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "config": config, "max_accuracy": 71.2}
    path = save({**value, "ema": Official(seed=1).state_dict(), "epoch": 3})
    configuration = load_checkpoint(path).configuration
    assert attributes_of(attributes_of(configuration["config"])["MODEL"]) == {"ARCH": "RepVGG-A0"}
    assert agree(exported(path, images), net, images)


@pytest.mark.exhaustive
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_whole_pickled_net_in_the_form_of_ultralytics(half: bool, zipped: bool, images: Tensor, save: Save) -> None:
    net, average = Official(), Official(seed=1)
    value = {"epoch": 3, "model": net.half() if half else net, "ema": average.half() if half else average}
    path = save({**value, "updates": 7, "train_args": {"imgsz": 32}}, _use_new_zipfile_serialization=zipped)
    assert agree(exported(path, images), net.float(), images)
    assert agree(exported(path, images, ema=True), average.float(), images)
