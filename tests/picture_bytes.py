"""Pictures as the bytes of their files, for tests that upload, pack or damage them."""

import io


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
