"""Custom nodes that only the tests use: conditioning without text encoders, latents as files, a look inside a model, a
block that is slow or raises. They import no other custom nodes."""

from . import model, process, wanvideo
from .base import TestCollectOften, TestSink, TestSlowProgress, TestTellReport, TestTellText

process.end_with_parent()
process.serve_pending_flags()
process.serve_messages()
process.collect_garbage_faster()
process.log_errors_told_to_the_user()

OF_ALL_HOSTS = (TestCollectOften, TestSink, TestTellReport, TestTellText, TestSlowProgress)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in (*OF_ALL_HOSTS, *model.NODES, *wanvideo.NODES)}
