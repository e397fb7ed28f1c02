"""Bad calls by their media: files, hashes, tensors, videos."""

import math
import struct
from typing import Any

from common.pb.rollout.v1 import rollout_pb2 as pb
from tests.hostile import images
from tests.hostile.calls import INT64, BadCall, Maker, chat


class MediaCalls(Maker):
    """Of Generate, whose media are wrong."""

    # ------------------------------------------------------------------------------------------- files

    def truncated_file(self) -> BadCall:
        return self._encoded(images.truncated(self._rng))

    def damaged_file(self) -> BadCall:
        return self._encoded(images.flipped(self._rng))

    def bomb(self) -> BadCall:
        return self._encoded(images.bomb(self._rng), "TOO_LARGE")

    def bomb_in_the_text(self) -> BadCall:
        return self._encoded(images.text_bomb())

    def promised_pixels(self) -> BadCall:
        return self._encoded(images.liar(self._rng), "INVALID_REQUEST", "TOO_LARGE")

    def animation(self) -> BadCall:
        return self._encoded(images.animation(self._rng))

    def deep_pixels(self) -> BadCall:
        return self._encoded(images.deep(self._rng))

    def no_image(self) -> BadCall:
        return self._encoded(images.foreign(self._rng), "INVALID_REQUEST", "TOO_LARGE")

    def large_file(self) -> BadCall:
        return self._encoded(bytes(self._limits.max_media_bytes + self._rng.randint(1, 99)), "TOO_LARGE")

    def empty_file(self) -> BadCall:
        return self._encoded(b"")

    def one_pixel(self) -> BadCall:
        """No mistake: it may be answered."""
        rng = self._rng
        data = images.picture(rng, rng.choice(("PNG", "JPEG", "WEBP")), size=1)
        return self._media("media.*|prompt", ("OK", "INVALID_REQUEST"), encoded=data)

    # ------------------------------------------------------------------------------------------- hashes

    def wrong_hash(self) -> BadCall:
        picture = images.picture(self._rng)
        return self._media(r"media\[0\]\.sha256", encoded=picture, sha256=self._rng.randbytes(32))

    def short_hash(self) -> BadCall:
        size = self._rng.choice((1, 16, 31, 33, 64))
        return self._media(r"media\[0\]\.sha256", sha256=self._rng.randbytes(size))

    def unknown_hash(self) -> BadCall:
        return self._media("", ("MEDIA_MISSING",), sha256=self._rng.randbytes(32))

    def no_content(self) -> BadCall:
        return self._media(r"media\[0\]\.content")

    def unknown_modality(self) -> BadCall:
        item = pb.MediaItem(encoded=images.picture(self._rng), modality=self._rng.choice((0, 9, 99)))
        return self._generate(r"media\[0\]\.modality", media=[item], chat=chat(1))

    # ------------------------------------------------------------------------------------------- tensors

    def wrong_pixels(self) -> BadCall:
        rng = self._rng
        dtype: Any = pb.DTYPE_UINT8
        shape, data = [2, 2, 3], bytes(12)
        match rng.randrange(6):
            case 0:
                dtype = rng.choice((0, pb.DTYPE_BOOL, pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, 77))
                data = bytes(12 * 4)
            case 1:
                shape = rng.choice(([12], [2, 6], [3, 2, 2], [1, 2, 2, 3], [0, 4, 3], []))
            case 2:
                shape = rng.choice(([-1, 4, 3], [2, -2, -3], [INT64, INT64, 3], [-(2**63), 2, 3], [2**32, 2**32, 3]))
            case 3:
                data = bytes(rng.choice((0, 11, 13)))
            case 4:
                shape = [1] * rng.randint(4, 40)
            case _:
                return self._media(r"media\[0\]\.pixels.*", pixels=pb.Tensor())
        tensor = pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
        return self._media(r"media\[0\]\.pixels.*", pixels=tensor)

    def wrong_video(self) -> BadCall:
        rng = self._rng
        frames = [images.picture(rng, size=8) for _ in range(3)]
        pace = rng.choice((0, -1, math.nan, 1e9))
        too_many = self._limits.max_video_frames + 1
        cases: Any = (
            (r"frames\.files", {"frames": pb.EncodedFrames()}),
            (r"frames\.files\[3\]", {"frames": pb.EncodedFrames(files=[*frames, images.truncated(rng)])}),
            (r"frames\.files\[3\]", {"frames": pb.EncodedFrames(files=[*frames, images.picture(rng, size=9)])}),
            # In some formats it is a large file, too.
            (r"frames(\.files\[3\])?", {"frames": pb.EncodedFrames(files=[*frames, images.bomb(rng)])}),
            (r"frames\.files", {"frames": pb.EncodedFrames(files=frames[:1] * too_many)}),
            (r"frames\.files\[0\]", {"frames": pb.EncodedFrames(files=[b""])}),
            (r"frames\.files", {"frames": pb.EncodedFrames(files=[b""] * rng.randint(too_many, 8000))}),
            ("frames_per_second", {"frames": pb.EncodedFrames(files=frames), "frames_per_second": pace}),
            ("encoded", {"encoded": frames[0]}),
            (r"pixels\.shape", {"pixels": pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[2, 2, 3], data=bytes(12))}),
            (r"pixels\.shape", {"pixels": pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[0, 2, 2, 3])}),
            ("frames_per_second", {"sha256": rng.randbytes(32), "frames_per_second": math.inf}),
        )
        field, video = rng.choice(cases)
        item = pb.MediaItem(modality=pb.MODALITY_VIDEO, **video)
        field = rf"media\[0\]\.{field}" + ("" if self._limits.max_videos else "|media")
        return self._generate(field, ("INVALID_REQUEST", "TOO_LARGE"), media=[item], chat=chat(1))

    def frames_of_an_image(self) -> BadCall:
        frames = pb.EncodedFrames(files=[images.picture(self._rng)])
        return self._media(r"media\[0\]\.frames", frames=frames)

    def large_pixels(self) -> BadCall:
        height = self._limits.max_media_pixels // 64 + 1
        tensor = pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[height, 64, 3], data=bytes(height * 64 * 3))
        return self._media(r"media\[0\]\.pixels.*", ("TOO_LARGE",), pixels=tensor)

    def wrong_tensors(self) -> BadCall:
        rng = self._rng
        good = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 2], data=bytes(16))
        named = pb.NamedTensor(name="pixel_values", tensor=good)
        match rng.randrange(5):
            case 0:
                tensors = []
            case 1:
                tensors = [pb.NamedTensor(name=rng.choice(("", "a b", "../x", "é", "x" * 129, "0x")), tensor=good)]
            case 2:
                tensors = [named, named]
            case 3:
                tensors = [pb.NamedTensor(name=f"t{i}", tensor=good) for i in range(65)]
            case _:
                wrong = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, rng.randint(3, 9)], data=bytes(16))
                tensors = [named, pb.NamedTensor(name="image_grid_thw", tensor=wrong)]
        return self._media(r"media\[0\]\.processed.*", processed=pb.ProcessedMedia(tensors=tensors))

    def tensors_that_are_not_finite(self) -> BadCall:
        rng = self._rng
        value = rng.choice((math.nan, math.inf, -math.inf))
        dtype, code = rng.choice(((pb.DTYPE_FLOAT32, "<f"), (pb.DTYPE_FLOAT64, "<d"), (pb.DTYPE_FLOAT16, "<e")))
        data = bytearray(struct.calcsize(code) * 6)
        struct.pack_into(code, data, rng.randrange(6) * struct.calcsize(code), value)
        tensor = pb.Tensor(dtype=dtype, shape=[2, 3], data=bytes(data))
        if rng.random() < 0.3:
            tensor = pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[1], data=struct.pack("<f", value)[2:])
        processed = pb.ProcessedMedia(tensors=[pb.NamedTensor(name="pixel_values", tensor=tensor)])
        return self._media(r"media\[0\]\.processed.*", processed=processed)

    def wrong_options(self) -> BadCall:
        limit = self._limits.max_media_pixels
        bounds = self._rng.choice(((0, None), (None, 0), (limit + 1, None), (None, 2**64 - 1), (9, 8)))
        options = pb.ProcessorOptions(min_pixels=bounds[0], max_pixels=bounds[1])
        return self._media(r"media\[0\]\.processor.*", encoded=images.picture(self._rng), processor=options)
