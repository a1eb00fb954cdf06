"""Uploads, the scans of --data, and what an attacker or a broken client may try."""

import asyncio
import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.deadline import check_deadline
from umbrella_jax.data.volume import load_volume
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.serve import guard, listen
from umbrella_jax.serve.app import make_app
from umbrella_jax.serve.guard import Access
from umbrella_jax.serve.listen import Server, bind
from umbrella_jax.serve.responses import octets
from umbrella_jax.serve.scans import FOLDER, Scans, UploadLimits, open_scans, remove_leftovers

MODALITIES = {
    "T1": ModalityConfig(size=(6, 4, 5), patch=(3, 2, 5)),
    "rsfMRI": ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 5, 2), stride_within_seq=2),
}
URL = "http://127.0.0.1:8765"


def nifti(shape: tuple[int, ...] = (12, 8, 10), axes: str = "LAS", **header: Any) -> bytes:
    """A scan whose axes point this way, 2 mm from voxel to voxel, with its origin elsewhere."""
    voxels = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    affine = np.diag([-2.0 if axes[0] == "L" else 2.0, 2, 2, 1])
    affine[:3, 3] = 10, -20, 30
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    for name, value in header.items():
        image.header[name] = value
    return bytes(image.to_bytes())


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Scans with their app, in a temporary folder that must be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @contextmanager
    def use(
        limits: UploadLimits | None = None, access: Access | None = None, data: Any = None, **options: Any
    ) -> Iterator[tuple[TestClient, Scans]]:
        with open_scans(MODALITIES, limits or UploadLimits(), data) as scans:
            app = make_app(scans, access or Access("127.0.0.1"), **options)
            with TestClient(app, base_url=URL) as client:
                yield client, scans
        assert not list(tmp_path.glob(f"{FOLDER}*"))

    return use


def upload(client: TestClient, content: bytes, name: str = "scan.nii", **options: Any) -> Any:
    return client.post("/api/scans", files={"file": (name, content)}, **options)


def stored(scans: Scans) -> list[str]:
    return sorted(name for name in os.listdir(scans.folder) if name != ".lock")


def error_of(response: Any) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["message"]


def test_an_upload_is_described_and_served_as_it_was(opened: Callable[..., Any]) -> None:
    content = gzip.compress(nifti((12, 8, 10, 9), pixdim=[-1, 2, 2, 2, 2.5, 0, 0, 0]))
    with opened() as (client, scans):
        response = upload(client, content, "../../etc/<script>alert(1)</script>.nii.gz")
        scan = response.json()
        assert response.status_code == 201
        assert scan["name"] == "script>.nii.gz"  # the last part of a path, escaped by the page
        assert (scan["shape"], scan["orientation"], scan["frames"], scan["tr"]) == ([12, 8, 10, 9], "LAS", 9, 2.5)
        assert (scan["zooms_mm"], scan["modality"], scan["warnings"]) == ([2, 2, 2], None, [])
        assert scan["guess"]["modality"] == "rsfMRI"
        assert "9 frames" in scan["guess"]["reason"]
        assert client.get("/api/scans").json() == [scan]
        assert oct(scans.folder.stat().st_mode)[-3:] == "700"
        assert oct(scans.path(scan["id"]).stat().st_mode)[-3:] == "600"
        assert client.get(f"/api/scans/{scan['id']}/file").content == content
        assert client.delete(f"/api/scans/{scan['id']}").status_code == 204
        assert stored(scans) == []
        assert error_of(client.get(f"/api/scans/{scan['id']}/file"))[:2] == (404, "no_such_scan")


def test_the_guess_of_two_modalities_needs_a_word_of_the_header(opened: Callable[..., Any]) -> None:
    with opened() as (client, scans):
        scans.modalities = {**MODALITIES, "FA": replace(MODALITIES["T1"], aliases=("dMRI",))}
        assert upload(client, nifti()).json()["guess"] is None
        guess = upload(client, nifti(descrip=b"dtifit of dMRI")).json()["guess"]
        assert guess["modality"] == "FA"


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_volume_that_the_model_sees_is_in_the_space_of_the_scan(opened: Callable[..., Any], modality: str) -> None:
    """The brightest voxel of both is at the same place, though the scan is stored from right to left."""
    shape = (12, 8, 10) if modality == "T1" else (12, 8, 10, 9)
    image = nib.Nifti1Image.from_bytes(nifti(shape))
    voxels = np.asarray(image.dataobj) + 0
    voxels[4:6, 4:6, 4:6] = 2000
    content = bytes(nib.Nifti1Image(voxels, image.affine, image.header).to_bytes())
    with opened() as (client, scans):
        id = upload(client, content).json()["id"]
        answer = client.get(f"/api/scans/{id}/seen?modality={modality}")
        seen = nib.Nifti1Image.from_bytes(answer.content)
        assert np.array_equal(np.asarray(seen.dataobj), load_volume(scans.path(id), MODALITIES[modality]))
        bright = np.argwhere(np.asarray(seen.dataobj) > 0.8 * np.asarray(seen.dataobj).max())[:, :3].mean(axis=0)
        expected = image.affine @ [4.5, 4.5, 4.5, 1]
        assert nib.aff2axcodes(seen.affine) == ("R", "A", "S")
        assert np.allclose(nib.affines.apply_affine(seen.affine, bright), expected[:3], atol=1.01)
        if modality == "rsfMRI":
            image.header.set_zooms((2, 2, 2, 1.5))
            timed = bytes(nib.Nifti1Image(voxels, image.affine, image.header).to_bytes())
            id = upload(client, timed).json()["id"]
            seen = nib.Nifti1Image.from_bytes(client.get(f"/api/scans/{id}/seen?modality=fMRI").content)
            assert seen.header.get_zooms()[3] == 3  # every other frame
            assert "no window 7" in error_of(client.get(f"/api/scans/{id}/seen?modality=fMRI&window=7"))[2]
        assert error_of(client.get(f"/api/scans/{id}/seen"))[:2] == (400, "unknown_modality")
        assert error_of(client.get(f"/api/scans/{id}/seen?modality=CT"))[0] == 400


def test_scans_of_the_data_bring_their_modality_and_questions(opened: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "study" / "secret"
    folder.mkdir(parents=True)
    for name in ("a.nii", "b.nii"):
        (folder / name).write_bytes(nifti())
    np.save(folder / "c.npy", np.ones((3, 4, 5), np.float32))

    def ask(text: str, *files: str) -> dict[str, Any]:
        parts = [{"type": "image", "modality": "sMRI", "image": f"secret/{file}"} for file in files]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
        return {"task_id": text, "conversations": [user, answer]}

    records = [ask("Sex?", "a.nii"), ask("Age?", "a.nii"), ask("Same?", "a.nii", "b.nii"), ask("Sex?", "c.npy")]
    records.append(ask("Sex?", "gone.nii"))
    (tmp_path / "study" / "data.json").write_text(json.dumps(records))
    data = read_conversations(tmp_path / "study" / "data.json", MODALITIES)
    with opened(data=data) as (client, _):
        a, b, c, gone = client.get("/api/scans").json()
        assert [scan["name"] for scan in (a, b, c, gone)] == ["a.nii", "b.nii", "c.npy", "gone.nii"]
        assert (a["modality"], a["task_questions"], b["task_questions"]) == ("T1", ["Sex?", "Age?"], [])
        assert gone["warnings"][0].startswith("gone.nii: not found")
        assert nib.Nifti1Image.from_bytes(client.get(f"/api/scans/{c['id']}/file").content).shape == (3, 4, 5)
        error = error_of(client.get(f"/api/scans/{gone['id']}/seen"))
        assert error[:2] == (422, "unusable_scan")
        assert str(tmp_path) not in error[2]
        assert error_of(client.delete(f"/api/scans/{a['id']}"))[:2] == (403, "not_an_upload")


def with_dim(content: bytes, *dim: int) -> bytes:
    """The scan with other numbers of axes and voxels in its header."""
    header = nib.Nifti1Header(content[:348])
    header["dim"][: len(dim)] = dim
    return bytes(header.binaryblock) + content[348:]


def with_offset(content: bytes, offset: float) -> bytes:
    """The scan whose header says that its voxels begin elsewhere."""
    header = nib.Nifti1Header(content[:348])
    header["vox_offset"] = offset
    return bytes(header.binaryblock) + content[348:]


ATTACKS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "text": (lambda: b"<html>" * 100, 415, "expected a NIfTI file"),
    "empty": (lambda: b"", 415, "empty"),
    "half a header": (lambda: nifti()[:200], 415, "cannot be read"),
    "half a scan": (lambda: nifti()[:1000], 415, "its header promises"),
    "half a gzip": (lambda: gzip.compress(nifti())[:2000], 415, "cannot be read"),
    "10^12 voxels": (lambda: with_dim(nifti(), 3, 10000, 10000, 10000), 415, "10000 × 10000 × 10000 voxels"),
    "10^12 packed voxels": (
        lambda: gzip.compress(with_dim(nifti(), 3, 10000, 10000, 10000)),
        415,
        "10000 × 10000 × 10000 voxels",
    ),
    "-5 voxels": (lambda: with_dim(nifti(), 3, -5, 8, 10), 415, "expected a whole volume"),
    "voxels after the end": (lambda: with_offset(nifti(), 1e6), 415, "its header promises"),
    "voxels before the beginning": (lambda: with_offset(nifti(), -1e6), 415, "vox_offset: -1000000 is within"),
    "2 GB of extensions": (lambda: gzip.compress(with_offset(nifti(), 2**31)), 415, "bytes, from"),
    "garbage after gzip": (lambda: gzip.compress(nifti()) + b"garbage", 415, "cannot be read"),
    "gzip bomb": (lambda: gzip.compress(nifti() + bytes(9 << 20), 1), 415, "unpacks to more than 8 MB, the limit"),
    "2 axes": (lambda: nifti((12, 8)), 415, "expected a volume"),
    "too large": (lambda: nifti((128, 128, 32)), 413, "larger than 2 MB, the limit of an upload"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses_what_is_no_scan_and_keeps_nothing_of_it(opened: Callable[..., Any], attack: str) -> None:
    make, status, message = ATTACKS[attack]
    with opened(UploadLimits(file_bytes=2 << 20, unpacked_bytes=8 << 20)) as (client, scans):
        got, _, text = error_of(upload(client, make(), "<b>.nii"))
        assert (got, message in text, str(scans.folder) in text) == (status, True, False), text
        assert text.startswith("<b>.nii: ")
        assert stored(scans) == []
        assert scans.usage() == (0, 0)


def test_refuses_uploads_beyond_number_and_total_and_removes_them_in_time(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = nifti()
    with opened(UploadLimits(number=3)) as (client, scans):
        assert [upload(client, content).status_code for _ in range(20)] == [201] * 3 + [507] * 17
        now = time.monotonic()
        clock = SimpleNamespace(
            time=time.time, monotonic=lambda: now + 3601
        )  # of the scans only: event loops of other tests run on
        monkeypatch.setattr("umbrella_jax.serve.scans.time", clock)
        assert client.get("/api/scans").json() == []
        assert upload(client, content).status_code == 201
        assert len(stored(scans)) == 1
    with opened(UploadLimits(total_bytes=2 * len(content) + 1)) as (client, scans):
        assert [upload(client, content).status_code for _ in range(4)] == [201, 201, 507, 507]
        assert len(stored(scans)) == 2


def test_a_slow_check_ends_and_holds_up_nothing_else(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_forever(path: Path, *_: Any) -> None:
        while True:
            check_deadline(path)
            time.sleep(0.01)

    with opened(UploadLimits(check_seconds=0.2)) as (client, _):
        id = upload(client, nifti(), "slow.nii").json()["id"]
        seen = client.get(f"/api/scans/{id}/seen?modality=T1").content
        with monkeypatch.context() as patched, ThreadPoolExecutor(9) as pool:
            patched.setattr("umbrella_jax.serve.scans.load_volume", read_forever)
            answers = [pool.submit(client.get, f"/api/scans/{id}/seen?modality=T1") for _ in range(9)]
            assert client.get("/healthz").json() == {"status": "ok"}
            for answer in answers:
                status, code, message = error_of(answer.result())
                assert (status, code) == (504, "too_slow")
                assert message.startswith("slow.nii: not read within 0.2 s")
        assert client.get(f"/api/scans/{id}/seen?modality=T1").content == seen  # no thread is lost


def test_a_scan_in_use_stays_until_its_request_ends(opened: Callable[..., Any]) -> None:
    with opened() as (client, scans):
        id = upload(client, nifti()).json()["id"]
        with scans.in_use(id) as scan, scans.in_use(id):
            assert client.delete(f"/api/scans/{id}").status_code == 204
            assert client.get(f"/api/scans/{id}/file").status_code == 404
            assert client.get("/api/scans").json() == []
            assert scan.path.is_file()
            assert scans.usage() == (1, len(nifti()))
        assert stored(scans) == []
        assert scans.usage() == (0, 0)


def test_a_file_that_the_disk_holds_only_a_part_of_is_refused(opened: Callable[..., Any]) -> None:
    """A write of a file without buffer returns as much as there was room for, without an error."""
    content = nifti((32, 32, 16))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened() as (client, scans):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) - 1000, before[1]))
        try:
            error = error_of(upload(client, content))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error[:2] == (507, "no_room")
        assert stored(scans) == []


def test_a_scan_inside_a_request_is_removed_after_it(opened: Callable[..., Any]) -> None:
    messages = list[str]()
    with opened() as (_, scans):

        async def use() -> None:
            async with scans.temporary("inside.nii", nifti()) as scan:
                assert scans.path(scan.id).is_file()
                assert scans.listed() == []
                messages.append(f"{scan.path}: damaged")
                assert scans.public(messages[0]) == "inside.nii: damaged"
                raise KeyError

        with pytest.raises(KeyError):
            asyncio.run(use())
        assert str(scans.folder) not in scans.public(messages[0])
        assert stored(scans) == []


MULTIPART = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.nii"\r\n\r\n'
FORMS = {
    "no form": (b"x", "text/plain"),
    "no boundary": (b"x", "multipart/form-data"),
    "no file": (b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--b--\r\n", MULTIPART),
    "other field": (b"--b\r\nContent-Disposition: form-data; name=x; filename=a\r\n\r\nx", MULTIPART),
    "long header": (b"--b\r\nX: " + b"y" * 99999, MULTIPART),
    "garbage": (b"\0" * 1000, MULTIPART),
    "ends early": (PART + nifti(), MULTIPART),
    "two files": (PART + nifti() + b"\r\n" + PART + b"x\r\n--b--\r\n", MULTIPART),
}


@pytest.mark.parametrize("form", FORMS)
def test_refuses_a_malformed_form(opened: Callable[..., Any], form: str) -> None:
    content, kind = FORMS[form]
    with opened() as (client, scans):
        response = client.post("/api/scans", content=content, headers={"content-type": kind})
        assert error_of(response)[:2] == (400, "malformed_form")
        assert stored(scans) == []


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "/static//etc/passwd",
        "/api/scans/..%2f..%2f..%2fetc%2fpasswd/file",
        "/api/scans/.lock/file",
        "/api/scans/%00/file",
    ],
)
def test_no_path_leads_to_another_file(opened: Callable[..., Any], path: str) -> None:
    with opened() as (client, _):
        assert client.get(path).status_code == 404


REFUSED = {
    "another host": ({"host": "evil.example"}, 421),
    "a host that resolves here": ({"host": "127.0.0.1.evil.example:8765"}, 421),
    "a malformed host": ({"host": "127.0.0.1:8765@evil.example"}, 421),
    "an empty host": ({"host": ""}, 421),
    "another origin": ({"origin": "http://evil.example"}, 403),
    "another port": ({"origin": "http://127.0.0.1:3000"}, 403),
    "no origin": ({"origin": "null"}, 403),
    "a picture on another site": ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_requests_that_another_site_causes(opened: Callable[..., Any], case: str) -> None:
    headers, status = REFUSED[case]
    with opened() as (client, scans):
        assert error_of(upload(client, nifti(), headers=headers))[0] == status
        assert error_of(client.get("/api/scans", headers=headers))[0] == status
        assert stored(scans) == []


@pytest.mark.parametrize(
    ("host", "own", "foreign"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost:80", "[::1]:8765"], ["192.0.2.1", socket.gethostname()]),
        ("::1", ["[::1]", "LOCALHOST."], ["[::2]", "::1", "[::1", "[::1]x", "127.0.0.1:x"]),
        ("192.0.2.1", ["192.0.2.1:1", "192.0.2.2", "localhost", socket.gethostname()], ["evil.example"]),
        ("node.example", ["node.example:8765", "192.0.2.2"], ["evil.example", "node.example.evil.example"]),
    ],
)
def test_an_address_makes_no_other_name_its_own(host: str, own: list[str], foreign: list[str]) -> None:
    access = Access(host)
    assert [name for name in own if not access.admits_host(name)] == []
    assert [name for name in foreign if access.admits_host(name)] == []


def test_every_answer_has_the_policy_and_no_cors(opened: Callable[..., Any]) -> None:
    with opened() as (client, _):
        own = {"origin": URL, "sec-fetch-site": "same-origin"}
        for response in (
            client.get("/api/scans", headers=own),
            client.get("/nowhere"),
            client.get("/healthz", headers={"host": "x"}),
            client.options("/api/scans", headers=own),
        ):
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "unsafe-inline" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert not [name for name in response.headers if name.startswith("access-control")]
        assert client.get("/healthz", headers={"host": "[::1]:1"}).status_code == 200
        assert client.get("/healthz", headers={"host": "LocalHost:99"}).status_code == 200


def test_a_token_is_needed_in_a_header_or_by_the_cookie_of_the_first_visit(opened: Callable[..., Any]) -> None:
    access = Access("0.0.0.0", "t" * 20)
    with opened(access=access) as (client, scans):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"{access.cookie}=wrong"}):
            assert error_of(client.get("/api/scans", headers=headers))[:2] == (401, "token")
            assert error_of(upload(client, nifti(), headers=headers))[0] == 401
        assert stored(scans) == []
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/healthz").status_code == 200
        assert client.get("/api/scans", headers={"authorization": f"Bearer {access.token}"}).json() == []
        assert client.get("/api/scans", headers={"host": "192.0.2.1:8765", "cookie": f"{access.cookie}={access.token}"})
        first = client.get(f"/?token={access.token}")
        assert "HttpOnly; SameSite=Strict" in first.headers["set-cookie"]
        assert str(access.token) not in first.text
        assert client.get("/api/scans").json() == []  # the client has kept the cookie
        assert error_of(client.get("/api/scans", headers={"host": "evil.example"}))[0] == 421


async def fails(request: Request) -> Response:
    await request.body()
    raise RuntimeError("which sub-01?")


async def refuses(request: Request) -> Response:
    raise DataError(f"{request.app.state.path}: unusable")


def test_logs_name_nothing_unless_asked(opened: Callable[..., Any]) -> None:
    routes = [Route("/v1/fails", fails, methods=["POST"]), Route("/v1/refuses", refuses)]
    for log_requests in (False, True):
        lines = list[str]()
        with opened(routes=routes, say=lines.append, log_requests=log_requests) as (client, scans):
            scan = upload(client, nifti(), "sub-01.nii").json()
            client.app.state.path = scans.path(scan["id"])  # type: ignore[attr-defined]
            assert client.get("/v1/refuses").json()["error"]["message"] == "sub-01.nii: unusable"
            assert error_of(client.post("/v1/fails", content=b"which sub-01?"))[:2] == (500, "failed")
            figures = client.get("/metrics").text
        assert 'umbrella_requests_total{endpoint="upload",method="POST",status="201"} 1.0' in figures
        assert f"umbrella_upload_bytes {float(len(nifti()))}" in figures
        assert scan["id"] not in figures
        text = "\n".join(lines)
        assert "RuntimeError" in text
        assert ("sub-01" in text, "POST /api/scans 201" in text) == (log_requests, log_requests)


async def large(_: Request) -> Response:
    return octets(bytes(32 << 20))


@pytest.fixture
def listening(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Scans]]:
    """The port of a server that waits only for a moment, and its scans."""
    monkeypatch.setattr(guard, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(guard, "_DRAINED_SECONDS", 0.3)
    monkeypatch.setattr(guard, "JSON_BYTES", 1000)
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 0.3)
    monkeypatch.setattr(listen, "_SEND_SECONDS", 0.5)
    routes = [Route("/v1/fails", fails, methods=["POST"]), Route("/v1/large", large)]
    with opened() as (_, scans), bind("127.0.0.1", 0) as bound:
        started = threading.Event()
        server = Server(make_app(scans, Access("127.0.0.1"), routes=routes), started.set)
        thread = threading.Thread(target=server.run, args=[[bound]])
        thread.start()
        assert started.wait(10)
        yield bound.getsockname()[1], scans
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_goes_away_or_stalls_leaves_nothing(listening: tuple[int, Scans]) -> None:
    port, scans = listening
    content = nifti()
    request = f"POST /api/scans HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content) + 500}\r\n".encode()
    request += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + PART + content[:3000]
    for goes_away in (True, False):
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(request)
            until(lambda: len(stored(scans)) == 1)
            if not goes_away:
                assert b"HTTP/1.1 408" in client.recv(100)
        until(lambda: scans.usage() == (0, 0))
        assert stored(scans) == []
    with socket.create_connection(("127.0.0.1", port), 5) as client:  # sends no headers
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert client.recv(100) == b""
    for body in (b"Content-Length: 2000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(f"POST /v1/fails HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode() + body)
            assert client.recv(100).startswith(b"HTTP/1.1 413")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5)


def is_closed(client: socket.socket) -> bool:
    """Whether the server closes the connection within five seconds; reads what it sent before."""
    try:
        while client.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_many_clients_that_leave_at_once_leave_nothing(listening: tuple[int, Scans]) -> None:
    port, scans = listening
    content = nifti()
    request = f"POST /api/scans HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content) + 500}\r\n".encode()
    request += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + PART + content[:3000]
    with ExitStack() as clients:
        for _ in range(150):
            clients.enter_context(connect(port)).sendall(request)
        until(lambda: scans.usage()[0] > 100)
    until(lambda: scans.usage() == (0, 0))
    assert stored(scans) == []


def test_no_client_holds_a_connection_by_asking_or_reading_slowly(listening: tuple[int, Scans]) -> None:
    port, _ = listening
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    healthy = b"GET /healthz HTTP/1.1\r\n" + host + b"\r\n"
    with connect(port) as client:  # half of a second request
        client.sendall(healthy)
        assert b"200 OK" in client.recv(1000)
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert is_closed(client)
    with connect(port) as client:
        client.sendall(b"GET /v1/large HTTP/1.1\r\n" + host + b"\r\n")
        time.sleep(1)  # and reads nothing
        assert is_closed(client)
    with connect(port) as client:
        client.sendall(b"GET /v1/large HTTP/1.1\r\n" + host + b"\r\n")
        received = 0
        while received < 32 << 20:  # for longer than the limit, but reads
            received += len(client.recv(1 << 20))
            time.sleep(0.02)


def test_more_connections_than_are_served_take_no_file_descriptors(
    listening: tuple[int, Scans], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _ = listening
    monkeypatch.setattr(listen, "_ACCEPTED", 4)
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 60)
    with ExitStack() as clients:
        opened = [clients.enter_context(connect(port)) for _ in range(12)]
        for client in opened[4:]:
            assert is_closed(client)
        opened[0].sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        assert b"200 OK" in opened[0].recv(1000)


STRANGE = {
    "two lengths": (b"POST /v1/fails HTTP/1.1\r\n%sContent-Length: 1\r\nContent-Length: 40\r\n\r\nx", 400),
    "length and chunks": (
        b"POST /v1/fails HTTP/1.1\r\n%sContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        500,  # of the chunks; the connection is closed after it
    ),
    "unknown coding": (b"POST /v1/fails HTTP/1.1\r\n%sTransfer-Encoding: xchunked\r\n\r\n", 400),
    "folded header": (b"GET /healthz HTTP/1.1\r\n%sX: a\r\n b\r\n\r\n", 200),
    "space before a colon": (b"GET /healthz HTTP/1.1\r\n%sContent-Length : 5\r\n\r\n", 400),
    "bare line feeds": (b"GET /healthz HTTP/1.1\n%sX: y\n\n", 200),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /healthz HTTP/1.1\r\n%sHost: evil.example\r\n\r\n", 400),
    "another host in the target": (b"GET http://evil.example/healthz HTTP/1.1\r\n%s\r\n", 404),
    "not http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
    "long target": (b"GET /" + b"a" * 999999 + b" HTTP/1.1\r\n%s\r\n", 400),
    "many headers": (b"GET /healthz HTTP/1.1\r\n%s" + b"X: y\r\n" * 99999 + b"\r\n", 400),
    "trace": (b"TRACE /healthz HTTP/1.1\r\n%s\r\n", 405),
    "head": (b"HEAD /healthz HTTP/1.1\r\n%s\r\n", 200),
    "upgrade": (b"GET /healthz HTTP/1.1\r\n%sConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
    "ranges": (b"GET /static/style.css HTTP/1.1\r\n%sRange: bytes=" + b"0-," * 2000 + b"0-\r\n\r\n", 200),
}


@pytest.mark.parametrize("form", STRANGE)
def test_strange_requests_are_answered_once_or_refused(listening: tuple[int, Scans], form: str) -> None:
    port, _ = listening
    content, status = STRANGE[form]
    with connect(port) as client:
        client.sendall(content.replace(b"%s", f"Host: 127.0.0.1:{port}\r\n".encode()))
        answers = b""
        with suppress(ConnectionError, TimeoutError):
            while piece := client.recv(1 << 20):
                answers += piece
        statuses = [int(line.split()[1]) for line in answers.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
        assert statuses[-1:] == [status]
        assert len(answers) < 100_000


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match=f"port: {bound.getsockname()[1]} on 127.0.0.1: Address already in use"):
            bind("127.0.0.1", bound.getsockname()[1])


PROGRAM = """
from umbrella_jax.serve.app import make_app
from umbrella_jax.serve.guard import Access
from umbrella_jax.serve.listen import Server, bind, ended_by_signals
from umbrella_jax.serve.scans import UploadLimits, open_scans
with ended_by_signals(), open_scans({}, UploadLimits()) as scans:
    (scans.folder / "upload.nii").touch()
    Server(make_app(scans, Access("127.0.0.1")), lambda: print(scans.folder, flush=True)).run([bind("127.0.0.1", 0)])
"""


def test_uploads_are_removed_by_signals_and_those_of_a_killed_server_by_the_next(tmp_path: Path) -> None:
    def start() -> tuple[Any, Path]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    started = [start() for _ in range(4)]
    assert all((folder / "upload.nii").exists() for _, folder in started)
    for (process, folder), number in zip(started, ("SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"), strict=True):
        remove_leftovers(tmp_path, age=0)
        assert folder.exists()  # its process runs
        process.send_signal(signal.Signals[number])
        process.communicate(timeout=60)
        assert folder.exists() == (number == "SIGKILL")
    remove_leftovers(tmp_path)
    assert started[-1][1].exists()  # too new: a server may have made it and not locked it yet
    remove_leftovers(tmp_path, age=0)
    assert list(tmp_path.iterdir()) == []
