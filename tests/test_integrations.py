"""Runs logged from Hugging Face's and Lightning's own loops, on tiny nets made from a config, without a download."""

import warnings

import pytest
import torch
from torch import nn

import dit_fast as dit

SIZE = 24


@pytest.fixture(autouse=True)
def quiet_libraries():
    """Both libraries warn of their own and of each other's affairs; ours still count as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="dit_fast")
        # a net of eight features has a large share of key biases, whose gradients are all rounding
        warnings.filterwarnings("default", message="the replay misses the parameters")
        yield


def truth(trajectory, problem, query, windows):
    """First-order scores by the slow estimator, in float64."""
    return dit.reference.score(trajectory, problem, query, windows, dtype=torch.float64).scores


class TestTransformers:
    @pytest.fixture
    def library(self):
        return pytest.importorskip("transformers", reason="transformers is not installed")

    def classifier(self, library, dropout=0.0):
        torch.manual_seed(0)
        config = library.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=3,
            attn_implementation="eager",
        )  # fmt: skip
        return library.BertForSequenceClassification(config)

    def items(self):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, 30, (SIZE, 6), generator=generator)
        labels = torch.randint(0, 3, (SIZE,), generator=generator)
        return [
            {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y in zip(tokens, labels, strict=True)
        ]

    def trainer(self, library, tmp_path, model, callback, dataset, **settings):
        settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **settings}
        settings = {"remove_unused_columns": False, "max_grad_norm": 0.5, "dataloader_drop_last": False, **settings}
        arguments = library.TrainingArguments(
            output_dir=str(tmp_path / "out"), report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True,
            disable_tqdm=True, **settings,
        )  # fmt: skip
        return library.Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])

    def problem(self, model, items):
        return dit.Problem(model, lambda output, y: nn.functional.cross_entropy(output.logits, y, reduction="none"), items)

    @pytest.mark.parametrize("accumulation, dropout", [(1, 0.0), (2, 0.0), (1, 0.1)])
    def test_a_trainers_run_is_logged_as_it_was(self, library, tmp_path, accumulation, dropout):
        from dit_fast.integrations.transformers import RecorderCallback, WithSampleIds

        model, items = self.classifier(library, dropout), self.items()
        callback = RecorderCallback(tmp_path / "log", num_samples=SIZE)
        trainer = self.trainer(
            library, tmp_path, model, callback, WithSampleIds(items), gradient_accumulation_steps=accumulation
        )
        trainer.train()
        trajectory = dit.Trajectory.open(tmp_path / "log")
        steps = -(-3 // accumulation)
        assert trajectory.num_steps == callback.num_steps == 2 * steps
        assert dict(trajectory.marks) == {"epoch 1": steps, "epoch 2": 2 * steps}
        assert sorted(torch.cat([trajectory.batch_ids(t) for t in range(steps)]).tolist()) == list(range(SIZE))
        assert [type(rule) for rule in trajectory.optimizer] == [dit.AdamW] * len(trajectory.optimizer)
        # score() replays steps of the log and refuses a problem that does not reproduce them
        query = dit.queries.logit({name: value[None] for name, value in items[0].items() if name != "labels"}, 1)
        problem = self.problem(model, items)
        result = dit.score(trajectory, problem, query, windows="epochs", sample_ids=[0, 1])
        assert torch.isfinite(result.scores).all() and (result.scores != 0).any()

    def test_a_wrong_loss_is_seen(self, library, tmp_path):
        from dit_fast.integrations.transformers import RecorderCallback, WithSampleIds

        model, items = self.classifier(library), self.items()
        self.trainer(library, tmp_path, model, RecorderCallback(tmp_path / "log"), WithSampleIds(items)).train()
        wrong = dit.Problem(model, lambda output, y: output.logits.square().sum(-1), items)
        query = dit.queries.parameter("classifier.bias", 0)
        with pytest.raises(ValueError, match="step 0"):
            dit.score(dit.Trajectory.open(tmp_path / "log"), wrong, query)

    def test_a_language_models_loss_is_per_token(self, library, tmp_path):
        from dit_fast.integrations.transformers import RecorderCallback, WithSampleIds

        torch.manual_seed(0)
        config = library.GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=1, n_head=2,
                                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")  # fmt: skip
        model = library.GPT2LMHeadModel(config)
        items = self.items()
        for i, item in enumerate(items):  # samples of different lengths: the mean of means would be another loss
            item["labels"] = torch.where(torch.arange(6) < 3 + i % 4, item["input_ids"], -100)
        trainer = self.trainer(
            library, tmp_path, model, RecorderCallback(tmp_path / "log"), WithSampleIds(items), gradient_accumulation_steps=2
        )
        trainer.train()

        def tokens_loss(output, labels):
            losses = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            return losses.sum(1)

        problem = dit.Problem(model, tokens_loss, items)
        result = dit.score(
            dit.Trajectory.open(tmp_path / "log"), problem, dit.queries.parameter("transformer.wte.weight", (3, 0))
        )
        assert torch.isfinite(result.scores).all()

    def test_what_cannot_be_logged_is_refused(self, library, tmp_path):
        from dit_fast.integrations.transformers import RecorderCallback, WithSampleIds

        model, items = self.classifier(library), self.items()
        with pytest.raises(TypeError, match="no option clip_norm"):
            RecorderCallback(tmp_path / "log", clip_norm=1.0)
        with pytest.raises(ValueError, match="remove_unused_columns=False"):
            self.trainer(
                library, tmp_path, model, RecorderCallback(tmp_path / "a"), WithSampleIds(items), remove_unused_columns=True
            ).train()
        with pytest.raises(ValueError, match="WithSampleIds"):
            self.trainer(library, tmp_path, model, RecorderCallback(tmp_path / "b"), items).train()
        with pytest.raises(TypeError, match="dicts"):
            WithSampleIds([(1, 2)])[0]
        with pytest.raises(TypeError, match="map-style"):
            WithSampleIds(iter(items))


class TestLightning:
    @pytest.fixture
    def library(self):
        return pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    def module(self, library, optimizers=1):
        class Net(library.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))

            def forward(self, x):
                return self.net(x)

            def training_step(self, batch, batch_idx):
                _, x, y = batch
                return nn.functional.cross_entropy(self(x), y)

            def configure_optimizers(self):
                made = [torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9) for _ in range(optimizers)]
                return made[0] if optimizers == 1 else made

        return Net()

    def trainer(self, library, tmp_path, callback, **settings):
        return library.Trainer(
            max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=str(tmp_path), **settings,
        )  # fmt: skip

    def data(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(SIZE, 5, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)

    def loader(self, **options):
        dataset = dit.with_ids(torch.utils.data.TensorDataset(*self.data()))
        return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, **options)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"accumulate_grad_batches": 2},
            {"gradient_clip_val": 0.3},
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ],
        ids=["plain", "accumulation", "norm", "value"],
    )
    def test_a_trainers_run_is_logged_as_it_was(self, library, tmp_path, settings):
        from dit_fast.integrations.lightning import RecorderCallback

        module = self.module(library)
        callback = RecorderCallback(tmp_path / "log", num_samples=SIZE)
        self.trainer(library, tmp_path, callback, **settings).fit(module, self.loader())
        trajectory = dit.Trajectory.open(tmp_path / "log")
        steps = -(-3 // settings.get("accumulate_grad_batches", 1))
        assert trajectory.num_steps == callback.num_steps == 2 * steps
        assert dict(trajectory.marks) == {"epoch 1": steps, "epoch 2": 2 * steps}
        problem = dit.Problem(module, nn.CrossEntropyLoss(reduction="none"), self.data())
        query = dit.queries.loss(*(part[:5] for part in self.data()))
        found = dit.score(trajectory, problem, query, windows="epochs", dtype=torch.float64).scores
        expected = truth(trajectory, problem, query, "epochs")
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()

    def test_what_cannot_be_logged_is_refused(self, library, tmp_path):
        from dit_fast.integrations.lightning import RecorderCallback

        with pytest.raises(TypeError, match="no option store_batches"):
            RecorderCallback(tmp_path / "log", store_batches=True)
        module = self.module(library)
        with pytest.raises(dit.UnsupportedError, match="precision"):
            self.trainer(library, tmp_path, RecorderCallback(tmp_path / "a"), precision="bf16-mixed").fit(module, self.loader())
        module = self.module(library, optimizers=2)
        module.automatic_optimization = False
        with pytest.raises(dit.UnsupportedError, match="one optimizer"):
            self.trainer(library, tmp_path, RecorderCallback(tmp_path / "b")).fit(module, self.loader())

    def test_a_failed_run_keeps_its_finished_steps(self, library, tmp_path):
        from dit_fast.integrations.lightning import RecorderCallback

        class Stop(library.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 1:
                    raise RuntimeError("the user's own error")

        trainer = self.trainer(library, tmp_path, RecorderCallback(tmp_path / "log"))
        trainer.callbacks.insert(0, Stop())
        with pytest.raises(RuntimeError, match="own error"):
            trainer.fit(self.module(library), self.loader())
        assert dit.Trajectory.open(tmp_path / "log").num_steps == 2
