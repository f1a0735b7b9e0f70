"""Prune a model and publish it: one command from a pretrained name to a Hub repository that others can load.

    hf auth login
    python examples/publish.py resnet50.a1_in1k me/flowers me/resnet50-flowers-half

The repository gets the weights as safetensors, a config, the plan, the recipe, the report, and a model card that says
what was removed and measured. Others load it with `scap_hub.load`, timm or transformers; the card says how.
"""

import argparse

import scap_hub
from scap_hub.cli import show_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="timm name, Hub id or folder")
    parser.add_argument("images", help="Hub id or folder of images with labels")
    parser.add_argument("repository", help="where to publish: owner/name")
    parser.add_argument("--recipe", default="half-macs", help="shipped name or YAML file")
    parser.add_argument("--private", action="store_true", help="if the repository is new, only you can see it")
    options = parser.parse_args(arguments)

    result = scap_hub.prune(options.model, options.images, options.recipe)
    show_report(result.report)
    url = result.push_to_hub(options.repository, private=options.private)
    print(f"published at {url}")

    model = scap_hub.load(options.repository)
    print(f"loaded again: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
