"""Custom nodes that only the tests use: conditioning without text encoders, latents as files, a look inside a model, a
block that is slow or raises. They import no other custom nodes."""

from . import model, process, wanvideo
from .base import TestSink, TestTellReport

process.end_with_parent()
process.serve_pending_flags()
process.collect_garbage_faster()
process.log_errors_told_to_the_user()

NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestSink, TestTellReport, *model.NODES, *wanvideo.NODES)}
