"""What several tests ask for: small notebooks, and a skip where something is not installed here."""

import contextlib
import json

import pytest


@pytest.fixture(scope="session")
def skip_if_not_fetched():
    """A context: what it encloses reads published files, and the test is skipped, with the command to run, where none is here."""
    from etastar.archives import NotFetched

    @contextlib.contextmanager
    def context():
        try:
            yield
        except NotFetched as missing:
            pytest.skip(str(missing))

    return context


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs an `etastar` command in an empty folder: (exit status, standard output, standard error)."""
    from etastar import cli

    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = cli.main([str(w) for w in words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


@pytest.fixture
def make_notebook(tmp_path):
    """Writes a notebook of (kind, source) cells; a kind of "parameters" is a tagged code cell."""

    def make(*cells, name="small.ipynb", outputs=()):
        body = []
        for kind, source in cells:
            cell = {"cell_type": "markdown", "id": f"cell{len(body)}", "metadata": {}, "source": source}
            if kind != "markdown":
                cell |= {"cell_type": "code", "outputs": list(outputs), "execution_count": None}
            if kind == "parameters":
                cell["metadata"] = {"tags": ["parameters"]}
            body.append(cell)
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        path = tmp_path / name
        path.write_text(
            json.dumps(
                {
                    "cells": body,
                    "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            )
        )
        return path

    return make
