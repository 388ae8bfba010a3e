"""What is used of torch beyond its public API, each with the reason, to be looked at with every new release.

The lowest supported version, 2.11, has all names that the package takes from torch, public and private: compared with its sources.
Where a name is missing in some builds, the code asks with `getattr`.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_lite"

PRIVATE = {
    "torch.Tensor._make_wrapper_subclass": "a weight of which only the codes are there",
    "torch._C._disabled_torch_function_impl": "a weight of which only the codes are there",
    "torch.utils._pytree.tree_map_only": "its values for operators that do not know codes",
    "torch._C._distributed_c10d": "the flight recorders' dumps, which not every build has",
    "torch._assert_async": "a check that does not wait for the device",
    "torch._foreach_copy_": "many small tensors in one kernel",
    "torch._foreach_mul_": "many small tensors in one kernel",
    "torch._subclasses.fake_tensor.FakeTensorMode": "a plan runs what training runs, without memory",
    "torch._foreach_norm": "many small tensors in one kernel",
    "torch.distributed.distributed_c10d._get_default_group": "the world group as an object",
    "torch.distributed.distributed_c10d._get_default_store": "the watchdog's notes",
    "torch.distributed.distributed_c10d._resolve_process_group": "operators get a group by its name",
    "torch.nn.utils.stateless._reparametrize_module": "`functional_call` around more than one call",
    "torch.ops._c10d_functional": "collectives that torch.compile traces",
    "torch.ops._c10d_functional.wait_tensor": "what a plan waits for",
    "torch.utils._python_dispatch.TorchDispatchMode": "a plan counts what operators do",
    "torch.ops.aten._scaled_dot_product_cudnn_attention.default": "what selective recompute keeps",
    "torch.ops.aten._scaled_dot_product_efficient_attention.default": "what selective recompute keeps",
    "torch.ops.aten._scaled_dot_product_flash_attention.default": "what selective recompute keeps",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default": "what selective recompute keeps",
    "torch.ops.aten._scaled_dot_product_efficient_attention": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_dot_product_flash_attention": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "attention in parts, which needs log-sum-exp",
    "torch.ops.aten._scaled_mm.default": "what selective recompute keeps",
    "torch.ops.profiler._record_function_enter_new.default": "what selective recompute does not count",
    "torch.ops.profiler._record_function_exit._RecordFunction": "what selective recompute does not count",
}


def torch_names(source: str) -> set[str]:
    """Every dotted name that begins at torch, or at a name imported from it, in full."""
    tree, known, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or "torch": a.name if a.asname else "torch" for a in node.names if _is_torch(a.name)}
        elif isinstance(node, ast.ImportFrom) and _is_torch(node.module or ""):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found |= set(known.values())
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        chain, end = [], node
        while isinstance(end, ast.Attribute):
            chain.append(end.attr)
            end = end.value
        if chain and id(node) not in inner and isinstance(end, ast.Name) and end.id in known:
            found.add(".".join([known[end.id], *reversed(chain)]))
    return found


def _is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def test_private_names_stand_in_one_list() -> None:
    names = set().union(*(torch_names(path.read_text()) for path in PACKAGE.rglob("*.py")))
    private = {n for n in names if any(part.startswith("_") and not part.endswith("__") for part in n.split("."))}
    assert private == set(PRIVATE)


def test_names_are_found_however_they_are_imported() -> None:
    source = "import torch\nimport torch.distributed as dist\nfrom torch.nn import _x as y\ndist._a.b(torch._c)\ny.d"
    assert torch_names(source) >= {"torch.distributed._a.b", "torch._c", "torch.nn._x.d"}
