"""What a user can mend ends with one sentence and exit code 1, wherever it is raised; see also tests/parallel."""

import json
import sys

import pytest
import torch.distributed as dist

from lasp.launch.bench import ranks as bench_ranks
from lasp.launch.cli import main
from lasp.launch.launchers import local
from lasp.launch.run.failures import RankFailure
from lasp.launch.run.rendezvous import Job
from lasp.parallel.user_errors import USER_ERRORS
from tests.launch.helpers import tiny_config

SENTENCE = "the rule was broken. Mend it."
kinds = pytest.mark.parametrize("kind", USER_ERRORS, ids=lambda kind: kind.__name__)


def _command_line(monkeypatch, error):
    """Exit code of ``lasp generate`` where the error is raised."""

    def fail(path):
        raise error

    monkeypatch.setattr("lasp.launch.run.generate.load_model", fail)
    monkeypatch.setattr(sys, "argv", ["lasp", "generate", "nowhere", "--prompt", "a"])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def raise_kind(config, kind):
    raise {known.__name__: known for known in (*USER_ERRORS, KeyError)}[kind](SENTENCE)


class Ended(BaseException):
    pass


def _end_of_local_rank(monkeypatch, folder, kind):
    """What the launcher says when the work of its one rank raises an error of this kind."""

    def end(code):
        raise Ended(code)

    store = dist.HashStore()
    task = {"config": tiny_config(folder).plain(), "work": f"{__name__}:raise_kind", "arguments": {"kind": kind}}
    store.set(local.TASK, json.dumps(task))
    monkeypatch.setattr(local, "_end_with_launcher", lambda launcher: None)
    monkeypatch.setattr(Job, "from_environment", classmethod(lambda cls: cls()))
    monkeypatch.setattr(Job, "store", lambda self, timeout: store)
    monkeypatch.setattr(local.os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        local._child()
    return local.explain_failure([1], store)


@kinds
def test_the_command_line_says_one_sentence(monkeypatch, capsys, kind):
    assert _command_line(monkeypatch, kind(SENTENCE)) == 1
    assert capsys.readouterr().err == f"error: {SENTENCE}\n"


def test_a_fault_of_ours_is_raised_with_its_traceback(monkeypatch):
    with pytest.raises(KeyError, match="the rule"):
        _command_line(monkeypatch, KeyError(SENTENCE))


@kinds
def test_a_local_rank_says_one_sentence(monkeypatch, capsys, tmp_path, kind):
    failure = _end_of_local_rank(monkeypatch, tmp_path, kind.__name__)
    assert str(failure) == SENTENCE and f"{kind.__name__}: {SENTENCE}" in failure.details
    assert _command_line(monkeypatch, failure) == 1
    assert capsys.readouterr().err == f"error: {SENTENCE}\n"


def test_a_fault_of_ours_on_a_local_rank_is_shown_with_its_traceback(monkeypatch, tmp_path):
    failure = _end_of_local_rank(monkeypatch, tmp_path, "KeyError")
    assert str(failure).startswith(f"rank 0 failed: KeyError: '{SENTENCE}'\nTraceback")


@kinds
def test_a_rank_of_a_benchmark_says_one_sentence(monkeypatch, capsys, kind):
    answer = json.loads(json.dumps(bench_ranks._failed(kind(SENTENCE))))
    with pytest.raises(ValueError if kind is ValueError else RankFailure) as failure:
        bench_ranks._raise_earliest([{"error": "a victim", "time": 2.0}, {**answer, "time": 1.0}])
    assert _command_line(monkeypatch, failure.value) == 1
    assert capsys.readouterr().err == f"error: {SENTENCE}\n"


def test_a_fault_of_ours_on_a_rank_of_a_benchmark_says_so():
    with pytest.raises(RankFailure, match=r"^a rank failed: KeyError: 'the rule"):
        bench_ranks._raise_earliest([bench_ranks._failed(KeyError(SENTENCE))])
