"""Bad calls of every method: bytes that are no message, uploads, weight updates."""

from typing import Any

from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from tests.hostile import images
from tests.hostile.calls import GENERATE, INT64, INVALID, PUT_MEDIA, WEIGHTS, BadCall, Maker


class ServiceCalls(Maker):
    """Of PutMedia and the weight service; and what no method can take apart."""

    def noise(self) -> BadCall:
        """Bytes that are no message."""
        method = self._rng.choice((GENERATE, PUT_MEDIA, WEIGHTS + "Stage", WEIGHTS + "Commit", WEIGHTS + "OpenEpoch"))
        # A length-delimited field that is longer than what follows.
        return BadCall("", method, (b"\x0a\x7f" + self._rng.randbytes(self._rng.randint(0, 99)),), "", INVALID)

    def large_message(self) -> BadCall:
        """In bytes, or in fields."""
        size, reasons = self._limits.max_message_bytes + 1, ("TOO_LARGE",)
        if self._rng.random() < 0.5:
            return BadCall("", GENERATE, (bytes(size),), "", frozenset(reasons))
        item = pb.MediaItem(modality=pb.MODALITY_VIDEO, frames=pb.EncodedFrames(files=[b""] * 9000))
        return self._generate("", reasons, media=[item])

    def wrong_upload(self) -> BadCall:
        rng, put = self._rng, pb.PutMediaRequest
        picture = images.picture(rng)
        sha256, size = content_hash(picture), len(picture)
        bomb = images.bomb(rng)
        cases: Any = (
            ("sha256", [put(chunk=picture)]),
            ("sha256", [put(sha256=bytes(31), num_bytes=size, chunk=picture)]),
            ("sha256", [put(sha256=rng.randbytes(32), num_bytes=size, chunk=picture)]),
            ("chunk", [put(sha256=sha256, num_bytes=size - 1, chunk=picture)]),
            ("num_bytes", [put(sha256=sha256, num_bytes=size + 1, chunk=picture)]),
            ("num_bytes", [put(sha256=sha256, num_bytes=2**63, chunk=picture)]),
            # More than a server takes of one item, or of one chunk.
            ("num_bytes|chunk", [put(sha256=sha256, num_bytes=2**20 + 1, chunk=bytes(2**20 + 1))]),
            ("num_bytes|chunk", [put(sha256=content_hash(bomb), num_bytes=len(bomb), chunk=bomb)]),
            ("chunk", [put(sha256=content_hash(b"no"), num_bytes=2, chunk=b"no")]),
            ("num_bytes", [put(sha256=sha256, num_bytes=size), put(sha256=sha256, num_bytes=size)]),
        )
        field, messages = rng.choice(cases)
        data = tuple(message.SerializeToString() for message in messages)
        return BadCall("", PUT_MEDIA, data, field, INVALID | {"TOO_LARGE"})

    def wrong_manifest(self) -> BadCall:
        parameter, manifest = weights_pb2.Parameter, weights_pb2.Manifest
        buckets = [weights_pb2.Bucket(num_bytes=16)]
        large = [weights_pb2.Bucket(num_bytes=2**60)]
        good = parameter(name="w", dtype="F32", shape=[4])
        huge = parameter(name="w", dtype="F32", shape=[INT64] * 9)
        field, wrong = self._rng.choice(
            (
                ("parameters", manifest()),
                ("policy_version", manifest(policy_version=-1, parameters=[good], buckets=buckets)),
                (r"parameters\[0\]\.bucket", manifest(parameters=[good])),
                (
                    r"parameters\[0\]\.dtype",
                    manifest(parameters=[parameter(name="w", dtype="F8", shape=[4])], buckets=buckets),
                ),
                (
                    r"parameters\[0\]\.shape",
                    manifest(parameters=[parameter(name="w", dtype="F32", shape=[-4])], buckets=buckets),
                ),
                (r"parameters\[0\]\.offset", manifest(parameters=[huge], buckets=buckets)),
                (r"buckets\[0\]\.num_bytes", manifest(parameters=[good], buckets=large)),
            )
        )
        request = weights_pb2.StageRequest(run_id="r", epoch=1, timeout_ms=9, manifest=wrong)
        return BadCall("", WEIGHTS + "Stage", (request.SerializeToString(),), rf"manifest\.{field}", INVALID)

    def wrong_weights(self) -> BadCall:
        another_run = weights_pb2.CommitRequest(run_id="another", epoch=-1, policy_version=3, timeout_ms=9)
        wrong_port = weights_pb2.OpenEpochRequest(run_id="r", epoch=1, master_host="h", master_port=70_000)
        cases: Any = (
            ("Stage", "INVALID_REQUEST", r"manifest\.parameters", weights_pb2.StageRequest()),
            ("OpenEpoch", "INVALID_REQUEST", "run_id", weights_pb2.OpenEpochRequest()),
            ("OpenEpoch", "INVALID_REQUEST", "master_port", wrong_port),
            ("Commit", "INVALID_REQUEST", "timeout_ms", weights_pb2.CommitRequest()),
            ("Commit", "STALE_EPOCH", "", another_run),
        )
        name, reason, field, message = self._rng.choice(cases)
        return BadCall("", WEIGHTS + name, (message.SerializeToString(),), field, frozenset({reason}))
