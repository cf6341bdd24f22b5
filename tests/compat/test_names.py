"""Names and paths of diffusers: each is there, and does what it does there."""

from __future__ import annotations

import importlib
import io
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import diffusers
import diffusers.callbacks
import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as Theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sdedit.image_processor import VaeImageProcessor

import sdedit
from conftest import picture
from sdedit.compat.paths import NAMES

# Where the names of a path lie in diffusers, if it has the path (0.42 has no Flax any more).
PATHS = [(path, name) for path, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("path", "name"), PATHS)
def test_a_name_is_the_thing_that_lives_elsewhere(path, name):
    module = importlib.import_module(path)
    found = getattr(module, name)
    assert name in dir(module) and name in module.__all__
    home = importlib.import_module(found.__module__)
    assert getattr(home, found.__qualname__) is found
    assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize(("path", "name"), [(p, n) for p, n in PATHS if "lax" not in n and "lax" not in p])
def test_diffusers_has_it_there_too(path, name):
    theirs = importlib.import_module(path.replace("sdedit", "diffusers", 1))
    assert hasattr(theirs, name)


def test_names_of_a_path_by_star_and_by_attribute():
    names = {}
    exec("from sdedit.pipelines.stable_diffusion import *", names)
    assert names["StableDiffusionImg2ImgPipeline"] is sdedit.StableDiffusionImg2ImgPipeline
    assert sdedit.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker
    with pytest.raises(AttributeError, match="it has "):
        _ = sdedit.pipelines.stable_diffusion.StableDiffusion3Pipeline


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionPipeline", "ControlNetModel"])
def test_absent_pipelines_say_which_are_here(name):
    with pytest.raises(ImportError, match=f"no {name}: its pipelines are StableDiffusionImg2ImgPipeline"):
        exec(f"from sdedit import {name}")
    with pytest.raises(AttributeError, match=f"no {name}: its pipelines are"):
        getattr(sdedit, name)
    assert not hasattr(sdedit, name)


def test_kinds(pipe):
    assert isinstance(pipe, sdedit.DiffusionPipeline)
    assert isinstance(pipe.unet, sdedit.ModelMixin) and isinstance(pipe.vae, sdedit.ModelMixin)
    assert isinstance(pipe.scheduler, sdedit.SchedulerMixin) and isinstance(pipe.scheduler, sdedit.ConfigMixin)


# Pictures


def test_load_image_from_a_path_an_address_and_pil(tmp_path):
    turned = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args): ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        for one in (str(tmp_path / "a.png"), address, Image.open(io.BytesIO(content))):
            ours, theirs = sdedit.utils.load_image(one), diffusers.utils.load_image(one)
            assert ours.mode == "RGB" and ours.size == (30, 40)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        assert sdedit.utils.load_image(address, lambda image: image.convert("L")).mode == "L"
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(FileNotFoundError):
        sdedit.utils.load_image(str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="expected a path"):
        sdedit.utils.load_image(3)


def test_grid_and_conversions_are_diffusers():
    many = [picture(20, 30, seed=i) for i in range(6)]
    for resize in (None, 16):
        ours = sdedit.utils.make_image_grid(many, 2, 3, resize=resize)
        assert np.array_equal(np.asarray(ours), np.asarray(diffusers.utils.make_image_grid(many, 2, 3, resize=resize)))
    with pytest.raises(ValueError, match="rows \\* cols = 4"):
        sdedit.utils.make_image_grid(many, 2, 2)
    array = np.random.default_rng(0).random((2, 9, 8, 3))
    for ours, theirs in zip(sdedit.utils.numpy_to_pil(array), diffusers.utils.numpy_to_pil(array), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    tensor = torch.rand(2, 3, 9, 8) * 2.4 - 1.2
    for ours, theirs in zip(sdedit.utils.pt_to_pil(tensor), diffusers.utils.pt_to_pil(tensor), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_gif(tmp_path):
    path = sdedit.utils.export_to_gif([picture(20, 20, seed=i) for i in range(3)], str(tmp_path / "a.gif"))
    with Image.open(path) as opened:
        assert opened.n_frames == 3


def test_noise_is_diffusers():
    from diffusers.utils.torch_utils import randn_tensor
    from sdedit.utils.torch_utils import randn_tensor as ours

    for shape in ((1, 4, 8, 8), (3, 4, 8, 8)):
        seeds = [torch.Generator().manual_seed(i) for i in range(shape[0])]
        again = [torch.Generator().manual_seed(i) for i in range(shape[0])]
        assert torch.equal(ours(shape, seeds), randn_tensor(shape, again))
        one, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        assert torch.equal(ours(shape, one, dtype=torch.float32), randn_tensor(shape, same, dtype=torch.float32))


def test_what_is_installed():
    assert sdedit.utils.is_torch_available() and not sdedit.utils.is_nothing_of_the_kind_available()
    assert sdedit.utils.is_torch_version(">=", "2.0") and not sdedit.utils.is_torch_version("<", "2.0")
    assert importlib.import_module("sdedit.utils.import_utils").is_torch_available()
    with pytest.raises(AttributeError, match=r"sdedit\.utils"):
        _ = sdedit.utils.what_is_this


def test_logging_is_pythons():
    before = sdedit.utils.logging.get_verbosity()
    sdedit.utils.logging.set_verbosity_error()
    assert sdedit.utils.logging.get_logger("sdedit.x").getEffectiveLevel() == sdedit.utils.logging.ERROR
    sdedit.utils.logging.set_verbosity(before)
    sdedit.utils.logging.disable_progress_bar()
    assert not sdedit.utils.logging.is_progress_bar_enabled()
    sdedit.utils.logging.enable_progress_bar()


# The image processor

PROCESSORS = [{}, {"do_normalize": False}, {"do_binarize": True, "do_normalize": False, "do_convert_grayscale": True}]
PROCESSORS += [{"vae_scale_factor": 16, "resample": "bicubic"}, {"do_resize": False}, {"do_convert_rgb": True}]


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
@pytest.mark.parametrize("kind", ["pil", "list", "np", "pt", "grey"])
def test_preprocess_is_diffusers(options, kind):
    array = np.stack([np.asarray(picture(43, 37, seed=i)) for i in range(2)]).astype(np.float32) / 255
    given = {
        "pil": picture(43, 37),
        "list": [picture(43, 37, seed=i) for i in range(2)],
        "np": array,
        "pt": torch.from_numpy(array.transpose(0, 3, 1, 2)),
        "grey": picture(43, 37, mode="L"),
    }[kind]
    ours, theirs = VaeImageProcessor(**options), Theirs(**options)
    torch.testing.assert_close(ours.preprocess(given), theirs.preprocess(given), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.preprocess(given, 32, 16), theirs.preprocess(given, 32, 16), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["default", "crop"]), *[st.integers(9, 70)] * 4)
def test_resize_modes_are_diffusers(mode, width, height, to_width, to_height):
    ours = VaeImageProcessor().resize(picture(width, height), to_height, to_width, mode)
    theirs = Theirs().resize(picture(width, height), to_height, to_width, mode)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(9, 70)] * 4)
def test_fill_keeps_the_whole_picture_and_repeats_its_edge(width, height, to_width, to_height):
    out = np.asarray(VaeImageProcessor().resize(picture(width, height), to_height, to_width, "fill"))
    assert out.shape == (to_height, to_width, 3)
    if to_width * height > to_height * width:  # room at the sides
        assert (out[:, 0] == out[:, max(to_width // 2 - (width * to_height // height) // 2, 0)]).all()
    theirs = np.asarray(Theirs().resize(picture(width, height), to_height, to_width, "fill"))
    wide, high = min(to_width, width * to_height // height), min(to_height, height * to_width // width)
    left, top = to_width // 2 - wide // 2, to_height // 2 - high // 2
    inside = np.s_[top : top + high, left : left + wide]
    assert np.array_equal(out[inside], theirs[inside])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_postprocess_is_diffusers(output_type):
    tensor = torch.rand(2, 3, 9, 8) * 2.4 - 1.2
    for flags in (None, [True, False]):
        ours = VaeImageProcessor().postprocess(tensor, output_type, flags)
        theirs = Theirs().postprocess(tensor, output_type, flags)
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))


@settings(max_examples=100, deadline=None)
@given(*[st.integers(8, 60)] * 6, st.integers(0, 12), st.data())
def test_crop_region_holds_the_mask_and_is_diffusers_where_that_does(w, h, width, height, _x, _y, pad, data):
    left, top = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    right, bottom = data.draw(st.integers(left + 1, w)), data.draw(st.integers(top + 1, h))
    mask = Image.new("L", (w, h))
    mask.paste(255, (left, top, right, bottom))
    box = VaeImageProcessor.get_crop_region(mask, width, height, pad)
    assert 0 <= box[0] <= left and 0 <= box[1] <= top and right <= box[2] <= w and bottom <= box[3] <= h


def test_overlay_keeps_what_the_mask_leaves():
    first, second, mask = picture(40, 30), picture(40, 30, seed=1), Image.new("L", (40, 30))
    mask.paste(255, (10, 5, 30, 20))
    for box in (None, (8, 4, 32, 22)):
        ours = np.asarray(VaeImageProcessor().apply_overlay(mask, first, second, box))
        theirs = np.asarray(Theirs().apply_overlay(mask, first, second, box))
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        outside = np.asarray(mask) == 0
        assert np.array_equal(ours[outside], np.asarray(first)[outside])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.preprocess("a.png"), "image: str; expected PIL images"),
        (lambda p: p.preprocess([]), "image: nothing"),
        (lambda p: p.preprocess([picture(), np.zeros((8, 8, 3))]), "all of one kind"),
        (lambda p: p.resize(picture(), 8, 8, "stretch"), "expected one of default, fill, crop"),
        (lambda p: p.resize(torch.zeros(1, 3, 8, 8), 8, 8, "crop"), "is for PIL images"),
        (lambda p: p.postprocess(picture()), "expected a tensor"),
        (lambda p: p.postprocess(torch.zeros(1, 3, 8, 8), "jpg"), "expected pil, np, pt or latent"),
        (lambda p: VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True), "one of them at most"),
        (lambda p: VaeImageProcessor(resample="best"), "expected one of linear"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(VaeImageProcessor())


# Callbacks and pipelines


@pytest.mark.parametrize("options", [{"cutoff_step_ratio": 0.5}, {"cutoff_step_ratio": None, "cutoff_step_index": 2}])
def test_guidance_ends_as_in_diffusers(folder, options):
    def drawn(library, callback, **loading):
        made = library.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None, **loading)
        made.set_progress_bar_config(disable=True)
        return made(
            "apple",
            picture(64, 64),
            strength=1.0,
            num_inference_steps=5,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=list(callback.tensor_inputs),
        ).images

    ours = drawn(sdedit, sdedit.callbacks.SDCFGCutoffCallback(**options))
    theirs = drawn(diffusers, diffusers.callbacks.SDCFGCutoffCallback(**options))
    whole = drawn(sdedit, sdedit.callbacks.MultiPipelineCallbacks([]))
    assert np.abs(ours - theirs).max() < 1e-3 < np.abs(ours - whole).max()


def test_callbacks_refuse():
    with pytest.raises(ValueError, match="cutoff_step_index"):
        sdedit.callbacks.SDCFGCutoffCallback(0.5, 3)
    with pytest.raises(ValueError, match="cutoff_step_ratio=2"):
        sdedit.callbacks.SDCFGCutoffCallback(2.0)


def test_auto_pipeline_shares_what_another_has(pipe, folder):
    made = sdedit.AutoPipelineForImage2Image.from_pretrained(folder)
    assert type(made) is sdedit.StableDiffusionImg2ImgPipeline
    other = sdedit.AutoPipelineForImage2Image.from_pipe(pipe, safety_checker=None)
    assert other.unet is pipe.unet and other is not pipe
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert sdedit.AutoPipelineForImage2Image.from_pipe(theirs).vae is theirs.vae
    with pytest.raises(ValueError, match="has no vae"):
        sdedit.AutoPipelineForImage2Image.from_pipe(object())
    with pytest.raises(OSError, match="from_pretrained"):
        sdedit.AutoPipelineForImage2Image()
