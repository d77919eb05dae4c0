"""TransformerLens's and nnsight's models taken in, captures and stores handed out, and nnsight as the reader.

What needs the libraries themselves is slow, as `make test-all` installs them; the rest runs against stand-ins of their shape.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import tiny_model
from families import FAMILIES, tiny_hf, tiny_tokenizer
from torch import nn

import workbench as wb
from workbench.attention import INSIDE
from workbench.checks.check import error
from workbench.checks.still import sites_of
from workbench.errors import BadCorpus, MissingPackage, RemoteUnavailable, UnknownModel, UnknownOption, UnknownSite
from workbench.interop.wrapped import unwrapped
from workbench.sites import Site
from workbench.tracer import edited

real_libraries = (pytest.mark.slow, pytest.mark.filterwarnings("ignore"))
"""Both warn when they are imported, of themselves and of what they import."""


def needs_the_libraries(test):
    for mark in real_libraries:
        test = mark(test)
    return test


class Wrapped(nn.Module):
    """Stands where a module of the model stood, as a bridge's components do, and must not be run."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.add_module("_original_component", module)

    def forward(self, *args, **kwargs):
        raise AssertionError("the wrapper was run")


def bridge_like(hf: nn.Module, **attributes):
    """What a TransformerBridge makes of a llama, in its outlines."""
    for block in hf.model.layers:
        block.self_attn.q_proj = Wrapped(block.self_attn.q_proj)
        block.self_attn, block.mlp = Wrapped(block.self_attn), Wrapped(block.mlp)
    hf.model.layers = nn.ModuleList(Wrapped(block) for block in hf.model.layers)
    kind = type("TransformerBridge", (), {"__module__": "transformer_lens.model_bridge.bridge"})
    bridge = kind()
    bridge.__dict__.update({"original_model": hf, "tokenizer": tiny_tokenizer(), "_weights_processed": False} | attributes)
    return bridge


def test_inside_a_bridge_are_hugging_faces_own_modules_and_weights():
    hf = tiny_hf("llama")
    hf.model.norm.register_forward_hook(lambda module, args, output: 2 * output)  # the user's, from before
    bridge = bridge_like(hf)
    model = wb.load(bridge, check=False)
    assert model.tokenizer is bridge.tokenizer
    assert model.hf is not hf
    assert isinstance(hf.model.layers[0], Wrapped)
    weight = hf.model.layers[1]._original_component.mlp._original_component.up_proj.weight
    assert model.block(1).mlp.up_proj.weight is weight
    with edited(model, {Site("mlp_out", 0): torch.zeros_like}):
        assert not hf.model.layers[0]._original_component.mlp._original_component._forward_hooks
    plain = tiny_hf("llama")
    plain.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        batch = model.tokenize("a dog")
        assert torch.equal(model.forward(batch), plain(batch.tokens).logits)


def test_forwards_that_were_patched_run_in_the_new_tree():
    hf = tiny_hf("llama")
    for module in hf.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))  # what device_map= leaves
    hf.model.layers[1].forward = type(hf.model.layers[1]).forward.__get__(hf.model.layers[1])
    wb.load(bridge_like(hf)).verify().require()


@pytest.mark.parametrize(
    ("attributes", "options", "kind", "text"),
    [
        (
            {"_weights_processed": True},
            {},
            UnknownModel,
            "were folded or centred .enable_compatibility_mode.*Boot the bridge afresh",
        ),
        (
            {"original_model": None},
            {},
            UnknownModel,
            "A TransformerBridge of TransformerLens was given, which holds no Hugging",
        ),
        ({}, {"dtype": torch.bfloat16}, UnknownOption, r"would tear the model from its TransformerBridge.*Call bridge.to"),
        ({}, {"device": "cpu"}, UnknownOption, r"would tear the model from its TransformerBridge"),
        ({"tokenizer": None}, {}, UnknownModel, r"A live model was given without its tokenizer. Pass tokenizer="),
        (
            {"original_model": nn.Linear(2, 2)},
            {},
            UnknownModel,
            "A TransformerBridge of TransformerLens was given, which holds no",
        ),
    ],
)
def test_bridges_that_cannot_be_taken_are_refused(attributes, options, kind, text):
    with pytest.raises(kind, match=text):
        wb.load(bridge_like(tiny_hf("llama"), **attributes), **options)


class Wrapper:
    """nnsight's wrapper of a model that it loads when it is first run."""

    __module__ = "nnsight.modeling.transformers"

    def __init__(self, hf):
        self._module, self.tokenizer, self.dispatched = hf, tiny_tokenizer(), False

    def dispatch(self):
        self.dispatched = True


def test_the_module_inside_an_nnsight_model_is_loaded_where_it_is_to_run():
    wrapper = Wrapper(tiny_hf("llama").to("meta"))
    model = wb.load(wrapper, check=False)
    assert not wrapper.dispatched
    assert model.hf is wrapper._module
    assert model.tokenizer is wrapper.tokenizer
    assert model.tokenize("a dog").tokens.device.type == "cpu"  # to be sent to where the weights are
    other = tiny_tokenizer()
    wrapper = Wrapper(tiny_hf("llama"))
    wrapper.tokenizer = None
    assert wb.load(wrapper, tokenizer=other).tokenizer is other
    assert wrapper.dispatched
    with pytest.raises(UnknownModel, match="A Linear was given where a model is wanted"):
        wb.load(Wrapper(nn.Linear(2, 2)))


def test_nothing_is_imported_for_other_objects():
    before = set(sys.modules)
    assert unwrapped("something", moved=True, meant_to_run=True) == ("something", None)
    assert set(sys.modules) == before


def test_a_missing_package_is_named_with_its_extra(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(MissingPackage, match=r"needs the package nnsight, .*pip install 'mi-workbench\[nnsight\]'"):
        wb.capture(llama, "a dog", "resid_post.0", backend="nnsight")
    with pytest.raises(MissingPackage, match=r"needs the package transformer_lens, .*'mi-workbench\[transformer-lens\]'"):
        wb.capture(llama, "a dog", "resid_post.0").to_transformer_lens()


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"backend": "hook"}, UnknownOption, "backend='hook' is not known. Use one of 'hooks', 'nnsight'"),
        ({"remote": True}, UnknownOption, "remote=True runs through nnsight. Pass backend='nnsight'"),
        ({"backend": "nnsight", "gradients": True}, UnknownOption, "gradients=True needs a pass that the workbench makes"),
    ]
    + [
        (
            {"sites": f"{name}.1", "backend": "nnsight"},
            UnknownSite,
            f"Site '{name}.1' lies inside the attention function.*'hooks'",
        )
        for name in INSIDE
    ],
)
def test_what_a_backend_cannot_do_is_refused(llama, options, kind, text):
    with pytest.raises(kind, match=text):
        wb.capture(llama, "a dog", **({"sites": "resid_post.0"} | options))


RECORDED = json.loads("""
{"deployments": {
  "a": {"deployment_level": "HOT", "application_state": "RUNNING", "repo_id": "openai-community/gpt2", "revision": "main",
        "task": "text-generation", "model_key": "nnsight.modeling.transformers.TransformersModel:{}"},
  "b": {"deployment_level": "WARM", "application_state": "DEPLOYING", "repo_id": "tiny/llama", "revision": "main",
        "task": "text-generation"}
}}
""")
"""An answer of NDIF's status, as nnsight 0.8.1 reads it: no llama here is running."""


@pytest.fixture
def ndif(monkeypatch):
    """nnsight's outlines, with NDIF behind it as far as a test says."""
    library = ModuleType("nnsight")
    library.CONFIG = SimpleNamespace(API=SimpleNamespace(APIKEY="a key"))
    library.status = lambda raw: RECORDED
    library.asked = []

    def no_network(repo_id, **options):
        library.asked.append((repo_id, options["revision"], options["task"]))
        raise ConnectionError("Failed to send request:\n503 Service Unavailable.")

    library.TransformersModel = no_network
    monkeypatch.setitem(sys.modules, "nnsight", library)
    return library


def remote_capture(name: str):
    hf = tiny_hf("llama")
    hf.config._name_or_path = name
    return wb.capture(wb.load(hf, tokenizer=tiny_tokenizer()), "a dog", "resid_post.0", backend="nnsight", remote=True)


def test_a_model_that_ndif_does_not_run_is_refused_before_anything_is_sent(ndif):
    with pytest.raises(RemoteUnavailable, match=r"NDIF does not run 'tiny/llama' now.*it runs: openai-community/gpt2"):
        remote_capture("tiny/llama")
    assert ndif.asked == []


def test_ndif_without_key_or_network_is_refused(ndif):
    ndif.status = lambda raw: {}
    with pytest.raises(RemoteUnavailable, match="NDIF could not be reached to ask whether it runs 'tiny/llama'"):
        remote_capture("tiny/llama")
    ndif.CONFIG.API.APIKEY = None
    ndif.status = None  # is not asked
    with pytest.raises(RemoteUnavailable, match=r"needs a key of NDIF, and none is set.*NDIF_API_KEY"):
        remote_capture("tiny/llama")


def test_a_failure_of_ndif_is_named(ndif):
    with pytest.raises(
        RemoteUnavailable, match="was asked to run 'openai-community/gpt2', and failed: 503 Service Unavailable"
    ):
        remote_capture("openai-community/gpt2")
    assert ndif.asked == [("openai-community/gpt2", "main", "text-generation")]


@pytest.mark.parametrize("site", ["mlp_out.0", "z.0", "pattern.0"])
def test_open_edits_are_not_forgotten_on_the_way_to_ndif(ndif, llama, site):
    with edited(llama, {Site.parse(site, 3): torch.zeros_like}), pytest.raises(UnknownOption, match="edits of an open block"):
        wb.capture(llama, "a dog", "resid_post.0", backend="nnsight", remote=True)
    assert ndif.asked == []


NO_BRIDGE = {"cohere query norms", "falcon 11b", "falcon 40b", "helium", "ministral", "phi query norms"}
"""The bridge of TransformerLens 3.9.0 cannot be put around these: see WITNESSES.md."""


@pytest.fixture
def booted(tmp_path):
    """Puts a bridge around a tiny model."""
    tiny_tokenizer().save_pretrained(tmp_path)  # the bridge reads the tokenizer's files again

    def boot(family: str):
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        hf = tiny_hf(family)
        hf.config.architectures = [type(hf).__name__]
        return TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(tmp_path))

    return boot


@needs_the_libraries
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_BRIDGE))
def test_a_bridge_is_taken_and_left_as_it_was(booted, family):
    bridge = booted(family)
    tokens = tiny_model(family).tokenize("a dog and a cat").tokens
    before = bridge.run_with_cache(tokens)[1]["blocks.1.hook_resid_post"]
    fired = []
    bridge.add_hook("blocks.1.hook_resid_post", lambda value, hook: fired.append(hook.name))
    model = wb.load(bridge)
    assert (model.verify().table["verdict"] == "ok").all()
    batch = model.tokenize(["a dog and a cat", "a dog"])
    assert fired == []
    fresh = tiny_model(family)
    with torch.no_grad():
        ours, truth = model.forward(batch), fresh.hf(**fresh.inputs(batch)).logits
    # Not bitwise: bridges switch some families to eager attention, which rounds otherwise.
    assert error(ours[batch.mask], truth[batch.mask]) < 1e-5
    assert {name: type(module) for name, module in model.hf.named_modules()} == {
        name: type(module) for name, module in fresh.hf.named_modules()
    }
    after = bridge.run_with_cache(tokens)[1]["blocks.1.hook_resid_post"]
    assert torch.equal(after, before)
    assert len(fired) == 1


@needs_the_libraries
def test_a_processed_bridge_is_refused(booted):
    bridge = booted("gpt2")
    bridge.enable_compatibility_mode(no_processing=True)
    wb.load(bridge)
    bridge = booted("gpt2")
    bridge.enable_compatibility_mode()
    with pytest.raises(UnknownModel, match="were folded or centred"):
        wb.load(bridge)


@needs_the_libraries
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_cache_is_transformer_lenss_own(booted, family):
    bridge = booted(family)
    model = wb.load(bridge)
    batch = model.tokenize("a dog and a cat")
    acts = wb.capture(model, batch, [str(site) for site in sites_of(model)], modules=[f"{model.row.path('layers')}.0"])
    ours, (_, theirs) = acts.to_transformer_lens(), bridge.run_with_cache(batch.tokens)
    assert type(ours) is type(theirs)
    assert len(ours) == len(acts) - 1  # all but the module
    without = (
        {"attn.hook_result"}
        if family in ("llama", "gemma2")
        else {f"attn.hook_{name}" for name in ("result", "rot_q", "rot_k")}
    )
    assert {name.split(".", 2)[2] for name in ours if name not in theirs.cache_dict} == without
    for name in ours:
        if name in theirs.cache_dict:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert ours["resid_post", -1] is acts["resid_post.2"]
    for ask in (
        lambda cache: cache["pattern", 1],
        lambda cache: cache.accumulated_resid(),
        lambda cache: cache.accumulated_resid(apply_ln=True),
        lambda cache: cache.stack_activation("mlp_out"),
        lambda cache: cache.get_neuron_results(1),
        lambda cache: cache.stack_neuron_results(2),
        lambda cache: cache.stack_head_results(incl_remainder=True),
    ):
        torch.testing.assert_close(ask(ours), ask(theirs), rtol=1e-5, atol=1e-5)


@needs_the_libraries
def test_a_cache_makes_head_results_of_z_and_says_what_it_has_not():
    transformer_lens = pytest.importorskip("transformer_lens")
    model = tiny_model("llama")
    acts = wb.capture(model, "a dog", ["z", "result"])
    cache = wb.capture(model, "a dog", "z").to_transformer_lens()
    assert isinstance(cache, transformer_lens.ActivationCache)
    heads = cache.stack_head_results()
    torch.testing.assert_close(heads, torch.cat([acts[f"result.{layer}"].movedim(2, 0) for layer in range(3)]))
    with pytest.raises(KeyError, match=r"ln_final.hook_scale"):
        cache.stack_head_results(apply_ln=True)
    with pytest.raises(AttributeError, match=r"has no 'tokens_to_residual_directions': give it a bridge to ask"):
        cache.logit_attrs(heads, 3)
    mixture = wb.capture(tiny_model("mixtral"), "a dog", ["router_logits", "mlp_out"]).to_transformer_lens()
    assert set(mixture) == {f"blocks.{layer}.hook_mlp_out" for layer in range(3)}


@needs_the_libraries
def test_nnsight_reads_what_hooks_read(family):
    model = tiny_model(family)
    batch = model.tokenize(["a dog and a cat", "a dog"], padding_side="left")
    sites = [str(site) for site in sites_of(model) if site.name not in INSIDE]
    modules = [model.row.path("ln_final"), model.row.path("layers") + ".1"]  # not in the order of the forward pass
    hooked = wb.capture(model, batch, sites, modules=modules, logits=True)
    read = wb.capture(model, batch, sites, modules=modules, logits=True, backend="nnsight")
    assert list(read) == list(hooked)
    for name in hooked:
        assert torch.equal(read[name], hooked[name]), name
    assert read.logits is not None
    assert torch.equal(read.logits, hooked.logits)
    options = {"positions": "last", "dtype": torch.float64, "backend": "nnsight"}
    last = wb.capture(model, batch, "resid_post", **options)
    torch.testing.assert_close(last["resid_post.1"][:, 0], hooked["resid_post.1"][:, -1].double())
    assert last.logits is None


@needs_the_libraries
def test_what_is_read_is_what_nnsights_own_trace_gives():
    from nnsight import NNsight, save

    wrapper = NNsight(tiny_hf("gpt2"))
    model = wb.load(wrapper, tokenizer=tiny_tokenizer())
    assert model.hf is wrapper._module
    model.verify().require()
    batch = model.tokenize("a dog")
    with torch.no_grad(), wrapper.trace(batch.tokens):
        pre, fused = save(wrapper.transformer.h[1].input), save(wrapper.transformer.h[1].attn.c_attn.output)
    acts = wb.capture(model, batch, ["k.1", "resid_pre.1"], backend="nnsight")
    assert torch.equal(acts["resid_pre.1"], pre)
    assert torch.equal(acts["k.1"].flatten(2), fused[..., 32:64])
    assert not acts["k.1"].requires_grad


@needs_the_libraries
def test_nnsight_refuses_what_it_would_read_otherwise():
    model = tiny_model("llama")
    with edited(model, {Site("mlp_out", 0): torch.zeros_like}):
        with pytest.raises(UnknownOption, match=r"'mlp_out.0' is edited in an open block"):
            wb.capture(model, "a dog", "mlp_out.0", backend="nnsight")
        read, hooked = (wb.capture(model, "a dog", "resid_post.0", backend=backend) for backend in ("nnsight", "hooks"))
        assert torch.equal(read["resid_post.0"], hooked["resid_post.0"])
    for backend in ("nnsight", "hooks"):
        with pytest.raises(UnknownOption, match=r"Module 'model.layers' was not called in the forward pass"):
            wb.capture(model, "a dog", modules=["model.layers"], backend=backend)
    with pytest.raises(UnknownOption, match=r"No module of .* has the path 'model.nothing'"):
        wb.capture(model, "a dog", modules=["model.nothing"], backend="nnsight")


@needs_the_libraries
def test_a_remote_capture_survives_the_way_to_a_server(tmp_path, monkeypatch):
    """nnsight's simulation of one: the trace is packed, unpacked where the workbench is hidden, and run."""
    import nnsight
    from nnsight.intervention.backends.local import LocalSimulationBackend

    tiny_hf("llama").save_pretrained(tmp_path)
    entry = {"repo_id": str(tmp_path), "application_state": "RUNNING", "revision": None, "task": "text-generation"}
    monkeypatch.setattr(nnsight, "status", lambda raw: {"deployments": {"a": entry}})
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(nnsight.TransformersModel, "_remote_backend", lambda self, *args: LocalSimulationBackend(self))
    tokenizer = tiny_tokenizer()
    unloaded = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=tokenizer)
    model = wb.load(unloaded, check=False)
    assert not unloaded.dispatched
    batch = model.tokenize(["a dog and", "a cat"], padding_side="left")
    sites = ["resid_post", "mlp_post.1", "k.0", "z.2"]
    far = wb.capture(
        model, batch, sites, modules=["model.norm"], logits=True, positions=[-1, 0], backend="nnsight", remote=True
    )
    assert not unloaded.dispatched
    near = wb.capture(tiny_model("llama"), batch, sites, modules=["model.norm"], logits=True, positions=[-1, 0])
    assert list(far) == list(near)
    for name in near:
        assert torch.equal(far[name], near[name]), name
    assert torch.equal(far.logits, near.logits)
    loaded = wb.load(unloaded)
    assert unloaded.dispatched
    assert torch.equal(wb.capture(loaded, batch, "q.1")["q.1"], wb.capture(tiny_model("llama"), batch, "q.1")["q.1"])


@needs_the_libraries
def test_sae_lens_trains_on_a_store(tmp_path):
    """Its own trainer takes the store's batches as they come, and what it trains explains them better and better."""
    from sae_lens import LoggingConfig, SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    texts = [f"{'abcdefghijklmnop'[i % 16]} dog{i} saw {i % 7} cats" for i in range(200)]
    store = wb.capture_to_store(tiny_model("llama"), texts, "resid_post.1", tmp_path, shard_tokens=500, progress=False)
    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=32, d_sae=128, l1_coefficient=0.01, dtype="float32"))
    cfg = SAETrainerConfig(
        total_training_samples=300 * 256, train_batch_size_samples=256, lr=3e-3, lr_end=3e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    provider = store.batches("resid_post.1", cfg.train_batch_size_samples, epochs=None, dtype=torch.float32)
    trainer = SAETrainer(cfg, sae, data_provider=provider)
    everything = store.read("resid_post.1").float()

    def unexplained():
        with torch.no_grad():
            return float((sae(everything) - everything).pow(2).sum() / (everything - everything.mean(0)).pow(2).sum())

    before, losses = unexplained(), []
    step = trainer.step
    trainer.step = lambda batch: losses.append(float((out := step(batch)).loss)) or out
    trainer.fit()
    assert len(losses) >= 300
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    assert unexplained() < 0.1 < before


@needs_the_libraries
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_datasets_library_is_a_corpus(streaming):
    from datasets import Dataset

    texts = ["a dog", "", "and a cat", "b"]
    dataset = Dataset.from_dict({"body": texts, "id": list("wxyz"), "n": [1, 2, 3, 4]})
    model = tiny_model("llama")
    corpus = wb.Corpus(dataset.to_iterable_dataset() if streaming else dataset, column="body")
    assert list(corpus.documents()) == list(zip("wxyz", texts, strict=True))
    assert corpus.count(model)[1:3] == wb.Corpus(texts).count(model)[1:3]
    with pytest.raises(BadCorpus, match=r"no column 'text'; it has body, id, n"):
        list(wb.Corpus(dataset).rows(model))
