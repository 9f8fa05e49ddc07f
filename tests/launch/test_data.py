import dataclasses

import numpy as np
import pytest
import torch

from lasp.launch.data.stream import DataPlan, PackedSequence, PackedStream, open_source, split_documents
from lasp.launch.data.token_files import TokenFile, list_files, read_texts, stdlib_files, write_token_file
from lasp.launch.data.tokenizer import ByteTokenizer, load_tokenizer
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import TEXTS, tokenizer_file


@pytest.fixture
def prepared(tmp_path):
    return write_token_file(tmp_path / "v1.5", TEXTS, ByteTokenizer())


def test_documents_come_back_with_their_end(prepared):
    assert len(prepared) == len(TEXTS) and prepared.info["tokens"] == prepared.num_tokens
    for n, text in enumerate(TEXTS):
        assert prepared.document(n).tolist() == [*text.encode(), 256]
    assert prepared.document(3, 2, 5).tolist() == list(TEXTS[3].encode()[2:5])


def test_megatron_reads_what_we_wrote_and_we_what_it_wrote(prepared, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = indexed.IndexedDataset(str(prepared.prefix))
    assert len(theirs) == len(TEXTS) and theirs.document_indices.tolist() == list(range(len(TEXTS) + 1))
    for n in range(len(TEXTS)):
        assert theirs[n].tolist() == prepared.document(n).tolist()

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for document in ([5, 70000, 7], [8], [9, 10]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    ours = TokenFile(tmp_path / "m")
    assert [ours.document(n).tolist() for n in range(3)] == [[5, 70000, 7], [8], [9, 10]]


def test_packed_documents_cover_the_stream_once_per_epoch(prepared):
    stream = PackedStream(prepared, np.arange(len(TEXTS)), seed=3)
    whole = stream.sequence(0, 2 * stream.epoch_tokens)
    pieces = [stream.sequence(start, 50) for start in range(0, 2 * stream.epoch_tokens - 50, 50)]
    joined = torch.cat([piece.tokens for piece in pieces])
    assert torch.equal(joined, whole.tokens[: len(joined)])
    documents = [whole.tokens[a:b].tolist() for a, b in zip(whole.cu_seqlens, whole.cu_seqlens[1:], strict=False)]
    n = len(TEXTS)
    assert sorted(documents[:n]) == sorted(documents[n:]) == sorted([*t.encode(), 256] for t in TEXTS)
    assert documents[:n] != documents[n:]  # every epoch has an order of its own
    for piece in pieces:
        ends = [i + 1 for i, token in enumerate(piece.tokens.tolist()) if token == 256]
        assert piece.cu_seqlens == tuple(sorted({0, *ends, 50}))


def _places(group, cp_size, dp_size, prefix):
    stream = PackedStream(TokenFile(prefix), np.arange(len(TEXTS)), 0)
    mesh = Mesh.build(cp_size, dp_size, group)
    return [batch.tokens for batch in DataPlan(50, 4).step_batches(stream, 200, mesh)]


def test_a_step_reads_the_same_tokens_on_every_mesh(ranks, prepared):
    stream = PackedStream(prepared, np.arange(len(TEXTS)), 0)
    expected = [stream.sequence(200 + 50 * n, 50).tokens for n in range(4)]
    for cp_size, dp_size in ((1, 1), (2, 2), (4, 1), (1, 4)):
        parts = ranks.run(_places, cp_size, dp_size, prepared.prefix, size=cp_size * dp_size)
        for dp_rank in range(dp_size):
            row = parts[dp_rank * cp_size : (dp_rank + 1) * cp_size]
            for m, shards in enumerate(zip(*row, strict=True)):
                assert torch.equal(torch.cat(shards, 1)[0], expected[m * dp_size + dp_rank])


def test_evaluation_reads_the_held_out_stream_once_at_most(prepared):
    stream = PackedStream(prepared, np.arange(4), None)
    batches, _ = DataPlan(64, 1).eval_batches(stream, 1000, Mesh.build())
    assert sum(batch.tokens.shape[1] for batch in batches) == stream.epoch_tokens


def test_the_held_out_split_is_fixed_and_disjoint():
    learn, held_out = split_documents(40, 0.1)
    assert len(held_out) == 4 and sorted([*learn, *held_out]) == list(range(40))
    assert len(split_documents(40, 0.001)[1]) == 1 and len(split_documents(40, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_documents(1, 0.1)


def test_unusable_data_is_refused_by_name(tmp_path, prepared):
    with pytest.raises(ValueError, match="every input is empty"):
        write_token_file(tmp_path / "empty", ["", ""], ByteTokenizer())
    assert not list(tmp_path.glob("empty*"))
    with pytest.raises(ValueError, match="lasp data prepare"):
        TokenFile(tmp_path / "absent")
    with pytest.raises(ValueError, match="does not exist"):
        list_files([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"matches '\*\.rst'"):
        list_files([tmp_path], "*.rst")
    with pytest.raises(ValueError, match=r"model\.vocab_size is 100"):
        PackedStream(prepared, np.arange(3), 0, vocab_size=100).sequence(0, 20)
    with pytest.raises(
        ValueError, match=rf"data\.seq_len = 99,999,999,999 tokens .* the 3,\d+ of all .* {prepared.prefix}"
    ):
        DataPlan(99_999_999_999, 1).check_length(PackedStream(prepared, np.arange(len(TEXTS)), 0))
    with pytest.raises(ValueError, match="holds no token"):
        PackedStream(prepared, np.arange(0), 0)
    (tmp_path / "v1.5.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="is truncated"):
        TokenFile(prepared.prefix)
    index = tmp_path / "v1.5.idx"
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"v1\.5\.idx is truncated: 20 bytes, its head has 34"):
        TokenFile(prepared.prefix)
    (tmp_path / "v1.5.idx").write_bytes(b"12")
    with pytest.raises(ValueError, match="not a Megatron index file"):
        TokenFile(prepared.prefix)


def test_a_tokenizer_file_round_trips_and_is_checked(tmp_path, prepared):
    path = tokenizer_file(tmp_path)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1] and tokenizer.eos == 0
    again = load_tokenizer("elsewhere.json", tokenizer.to_json())
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    with pytest.raises(ValueError, match=r"Set data\.tokenizer=bytes"):
        open_source(str(prepared.prefix), tmp_path, tokenizer)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a Hugging Face tokenizers JSON"):
        load_tokenizer(str(path))


def test_special_tokens_that_a_tokenizer_file_would_add_are_left_out(tmp_path):
    """Its post-processor puts an end before and after every text; a document gets one, after it, and a prompt none."""
    tokenizers = pytest.importorskip("tokenizers")
    plain = load_tokenizer(str(tokenizer_file(tmp_path)))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(tmp_path / "template.json"))
    assert backend.encode(TEXTS[1]).ids == [0, *plain.encode(TEXTS[1]), 0]
    tokenizer = load_tokenizer(str(tmp_path / "template.json"))
    assert tokenizer.encode(TEXTS[1]) == plain.encode(TEXTS[1])
    file = write_token_file(tmp_path / "words", TEXTS, tokenizer)
    assert file.document(1).tolist() == [*plain.encode(TEXTS[1]), 0]


def test_bytes_round_trip_even_where_they_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    tokenizer = ByteTokenizer()
    (text,) = read_texts([tmp_path / "latin.txt"])
    assert tokenizer.encode(text) == list(b"caf\xe9")
    assert tokenizer.decode([99, 97, 256, 195, 169]) == "caé"


def test_the_standard_library_is_found_without_tests():
    files = stdlib_files()
    assert len(files) > 100 and files == sorted(files)
    assert not any({"site-packages", "test", "tests"} & set(path.parts[-3:-1]) for path in files)


def test_a_sequence_is_cut_as_the_layout_says(prepared):
    batch = DataPlan(12, 1, "zigzag").cut(PackedSequence(torch.arange(12), (0, 5, 12)), Mesh.build())
    assert batch.labels.tolist() == [[1, 2, 3, 4, -100, 6, 7, 8, 9, 10, 11, -100]]


def test_held_out_sequences_that_measure_nothing_are_left_out_by_name(tmp_path):
    file = write_token_file(tmp_path / "t", ["ab", "c"], ByteTokenizer())  # 3 and 2 tokens
    eight = dataclasses.replace(Mesh.build(), cp_size=8)
    batches, note = DataPlan(64, 1).eval_batches(PackedStream(file, np.arange(2), None), 4, eight)
    assert not batches and note.startswith("1 of 1 held-out sequences left out: shorter than cp_size = 8")
    batches, note = DataPlan(64, 1).eval_batches(PackedStream(file, np.arange(2), None), 4, Mesh.build())
    assert len(batches) == 1 and note is None
