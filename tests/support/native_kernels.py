"""The C++ kernels as functions of arrays (native/tests/c_api.cpp by ctypes)."""

import ctypes

import numpy as np
import torch

_SIZE, _TEXT = ctypes.c_size_t, ctypes.c_char_p
_ARRAY = ctypes.c_void_p


def _at(array):
    return array.ctypes.data_as(_ARRAY)


class NativeKernels:
    """Every function takes the name of a kernel set where it says `kernels`."""

    def __init__(self, path):
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        for name in ("kernel_set", "best_kernels", "describe"):
            getattr(self._library, f"mpqdm_test_{name}").restype = _TEXT
        self.kernel_sets = self._names()
        self.best_kernels = self._library.mpqdm_test_best_kernels().decode()

    def _names(self):
        names = []
        while name := self._library.mpqdm_test_kernel_set(_SIZE(len(names))):
            names.append(name.decode())
        return tuple(names)

    def blob_error(self, blob):
        """What is wrong with a blob, structure or checksum; None if nothing is."""
        data = blob.numpy()
        error = self._library.mpqdm_test_blob_error(_at(data), _SIZE(len(data)))
        return self._library.mpqdm_test_describe(error).decode() if error else None

    def unpack(self, blob, rows, depth):
        """int8 [rows, depth]."""
        data, weights = blob.numpy(), np.zeros((rows, depth), np.int8)
        done = self._library.mpqdm_test_unpack(_at(data), _SIZE(len(data)), _at(weights))
        assert done == 0
        return torch.from_numpy(weights)

    def convolve(
        self, kernels, blob, images, out_shape, stride=1, padding=0, upsampling=1, threads=1
    ):
        """Results, float32, and their integers, int32, both of `out_shape` [B, H, W, rows].

        Images are codes [B, H, W, C], scale [R] and zero point [R].
        """
        codes, scale, zero_point = (tensor.contiguous().numpy() for tensor in images)
        data = blob.numpy()
        shape = np.array([*codes.shape[:3], stride, padding, upsampling], np.uintp)
        results, integers = np.zeros(out_shape, np.float32), np.zeros(out_shape, np.int32)
        done = self._library.mpqdm_test_convolve(
            kernels.encode(),
            *(_at(data), _SIZE(len(data))),
            *(_at(codes), _at(scale), _at(zero_point), _SIZE(len(scale))),
            *(_at(shape), _SIZE(threads), _at(results), _at(integers)),
        )
        assert done == 0
        return torch.from_numpy(results), torch.from_numpy(integers)

    def quantize(self, kernels, x, parts, threads=1):
        """Codes, scale and zero point."""
        numbers, codes = x.contiguous().numpy(), np.zeros(x.shape, np.int8)
        scale, zero_point = np.zeros(parts, np.float32), np.zeros(parts, np.int32)
        done = self._library.mpqdm_test_quantize(
            kernels.encode(),
            *(_at(numbers), _SIZE(numbers.size), _SIZE(parts), _SIZE(threads)),
            *(_at(codes), _at(scale), _at(zero_point)),
        )
        assert done == 0
        return tuple(map(torch.from_numpy, (codes, scale, zero_point)))

    def quantize_static(self, kernels, x, scale, zero_point, threads=1):
        """Codes on a known range."""
        numbers, codes = x.contiguous().numpy(), np.zeros(x.shape, np.int8)
        done = self._library.mpqdm_test_quantize_static(
            kernels.encode(),
            *(_at(numbers), _SIZE(numbers.size), ctypes.c_float(scale)),
            *(ctypes.c_int32(zero_point), _SIZE(threads), _at(codes)),
        )
        assert done == 0
        return torch.from_numpy(codes)

    def group_norm(self, kernels, x, weight, bias, factor, groups, eps, silu, threads=1):
        """float32 in the shape of x [B, H, W, C]."""
        tensors = [t.contiguous().numpy() for t in (x, weight, bias, factor)]
        pixels = x.shape[1] * x.shape[2]
        shape = np.array([x.shape[0], pixels, x.shape[3], groups], np.uintp)
        out = np.zeros(x.shape, np.float32)
        done = self._library.mpqdm_test_group_norm(
            kernels.encode(),
            *(*map(_at, tensors), _at(shape)),
            *(ctypes.c_float(eps), ctypes.c_int(silu), _SIZE(threads), _at(out)),
        )
        assert done == 0
        return torch.from_numpy(out)

    def codes_error(self, kernels, stream, shape, codes):
        """Decodes a layer [rows, channels, places] into `codes`; number of what is wrong, or 0."""
        data, sizes = stream.contiguous().numpy(), np.array(shape, np.uintp)
        return self._library.mpqdm_test_decode_codes(
            kernels.encode(), _at(data), _SIZE(len(data)), _at(sizes), _at(codes.numpy())
        )

    def decode_codes(self, kernels, stream, rows, channels, places):
        """int8 [rows, channels * places]; None if the stream is refused."""
        codes = torch.zeros(rows, channels * places, dtype=torch.int8)
        error = self.codes_error(kernels, stream, (rows, channels, places), codes)
        assert error >= 0
        return None if error else codes

    def encode_codes(self, codes, classes):
        """uint8 [n]."""
        numbers, places = codes.contiguous().numpy(), classes.contiguous().numpy()
        for name in ("encoded_limit", "encode_codes"):
            getattr(self._library, f"mpqdm_test_{name}").restype = _SIZE
        limit = self._library.mpqdm_test_encoded_limit(_SIZE(numbers.size))
        stream = np.zeros(limit, np.uint8)
        size = self._library.mpqdm_test_encode_codes(
            _at(numbers), _at(places), _SIZE(numbers.size), _at(stream)
        )
        return torch.from_numpy(stream[:size])
