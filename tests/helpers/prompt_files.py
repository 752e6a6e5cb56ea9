"""Files of prompts in published layouts."""

import json
from pathlib import Path
from random import Random
from typing import Any

# The first rows of the published file. It has no quoting, and one prompt begins with a quotation
# mark.
PARTI = """Prompt\tCategory\tChallenge\tNote
"G I G G L E" painted in thick colorful lettering as graffiti on a faded red brick wall\tIllustrations\tWriting\t
a cartoon of a dog saying "I see what you did there"\tAnimals\tWriting\t
 A sloth in a go kart on a race track.\tAnimals\tFine-grained Detail\t
42\tAbstract\tBasic\tSimple numbers but challenging
7 dogs sitting around a poker table\tAnimals\tQuantity\tDescription of "Dogs Playing Poker"
"""  # noqa: E501

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")


def write_file(path: Path, content: object) -> str:
    """Write a text, or anything else as JSON, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def make_coco_captions(num_images: int, num_captions: int, prefix: str = "") -> dict[str, Any]:
    """Make the content of one of COCO's files of captions, with shuffled annotations.

    Caption j of image i is `i-j`. Its id increases with j, and the id of an image decreases with i.
    """
    image_ids = [1000 - 7 * i for i in range(num_images)]
    annotations = []
    for i, image_id in enumerate(image_ids):
        for j in range(num_captions):
            caption = f"{prefix}{i}-{j} \n"
            annotations.append({"image_id": image_id, "id": 10 * image_id + j, "caption": caption})
    Random(0).shuffle(annotations)
    images = [{"id": image_id, "file_name": f"{image_id:012}.jpg"} for image_id in image_ids]
    return {"images": images, "annotations": annotations}
