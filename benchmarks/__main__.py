"""What the benchmarks compute besides their times: python benchmarks COMMAND; each COMMAND has its own --help."""

import argparse
import importlib
import sys

# command: module with a function main(), and what it does
COMMANDS = {
    "summary": ("cpu.summary", "goals, tables and plots of what make bench measured"),
    "coco_size": ("cpu.coco_size", "images, start and metric at the size of COCO"),
    "step_profile": ("cpu.step_profile", "where the extra time of 11 groups goes"),
    "step_host": ("cpu.step_host", "what the host does in a step beside the model"),
    "digits_run": ("cpu.digits_run", "where the time of a run of groupdetr analyze on the digits goes"),
    "op_host": ("cpu.op_host", "what an eager call of an op costs the host, without a GPU"),
    "beside_dab_detr": ("cpu.beside_dab_detr", "the original DAB-DETR beside ours, step by step"),
    "beside_originals": ("cpu.beside_originals", "the authors' own code beside ours: outputs, losses, every gradient"),
    "predict_folder": ("cpu.predict_folder", "images a second of a folder, read ahead and by size, or in order"),
    "compile_gpu": ("gpu.compile_gpu", "every GPU kernel, compiled without a GPU: registers, spills and inner loops"),
    "inner_loops": ("gpu.inner_loops", "instructions of inner loops alone, also against those of another commit"),
    "assignment_search": ("gpu.assignment_search", "turns of assignments, and doubles in a turn, without a GPU"),
    "deformable_tiles": ("gpu.deformable_tiles", "walks of deformable attention over sorted samples, without a GPU"),
    "gpu_carry": ("gpu.carry", "what to take to a GPU machine without network"),
    "gpu_tables": ("gpu.tables", "tables of what gpu_report.py measured"),
    "evidence": ("paper.evidence", "the paper's tables and figures by trainings on one GPU, in the time there is"),
    "speed": ("paper.speed", "the picture of the first page: how many times as fast as what else there is"),
    "roofline": ("paper.roofline", "floors of the kernels on an H100, on paper"),
    "scaling": ("paper.scaling", "steps and epochs of many GPUs, on paper"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n\n" + "\n".join(f"{name:18}{text}" for name, (_, text) in COMMANDS.items()),
        usage="python benchmarks COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see above")
    name = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f"benchmarks {name}"]  # so that usage and errors name the command
    sys.exit(importlib.import_module(COMMANDS[name][0]).main())


if __name__ == "__main__":
    main()
