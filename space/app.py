"""A Hugging Face Space: the page of `make app`. Host and port come from the Space (GRADIO_SERVER_NAME, _PORT)."""

from cleandift_backbones.app.page import Page

if __name__ == "__main__":
    page = Page(["cleandift_tiny", "dift_tiny"], device="auto")
    page.launch(prevent_thread_lock=True)
    page.blocks.block_thread()
