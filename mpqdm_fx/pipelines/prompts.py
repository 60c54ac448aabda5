"""Captions to calibrate on: plain descriptions, written for this package."""

from pathlib import Path

from mpqdm_fx.errors import ConfigError

__all__ = ["DEFAULT_PROMPTS", "read_prompts"]

#: Subjects, styles, light, numbers of words and of things are mixed, so that ranges of activations
#: are those of everyday prompts. None of them is taken from a data set.
DEFAULT_PROMPTS: tuple[str, ...] = (
    "a cat",
    "a brown dog running across a wet beach at low tide",
    "portrait of an old fisherman with a grey beard, soft window light, 85mm photograph",
    "a red bicycle leaning against a yellow wall",
    "an oil painting of a village in the mountains under heavy snow",
    "two children building a sand castle",
    "aerial view of a winding river in autumn, trees in orange and red",
    "a bowl of noodle soup with a boiled egg and spring onions, top view",
    "pencil sketch of a human hand holding a key",
    "a crowded street market at night, neon signs reflected in puddles",
    "a lighthouse on a cliff during a thunderstorm, dramatic clouds",
    "macro photograph of a bee on a lavender flower",
    "isometric drawing of a small kitchen with green cupboards",
    "a steam train crossing a stone bridge, morning fog",
    "an astronaut reading a newspaper on a park bench",
    "watercolour of three pears on a wooden table",
    "a tall glass building seen from below against a clear blue sky",
    "a family of elephants walking towards a waterhole at sunset",
    "cartoon of a smiling robot watering plants",
    "a violin lying on sheets of music, shallow depth of field",
    "an empty desert road leading to distant mountains",
    "a woman in a blue raincoat waiting for a tram, reflections, 35mm film",
    "stained glass window showing a ship on the sea",
    "a plate of cookies",
    "a black and white photograph of a jazz band on a small stage",
    "low poly render of a fox in a forest, 3d, bright colours",
    "close-up of a frozen leaf with ice crystals",
    "a map of an imaginary island with a volcano, ink on parchment",
    "a hot air balloon above fields of tulips, early morning",
    "interior of an old library with ladders and a cat sleeping on a chair",
    "a football player jumping for the ball, frozen motion, stadium lights",
    "simple icon of a house, white background",
    "a cup of black coffee beside an open laptop, morning light",
    "three sheep on a hill",
    "charcoal drawing of a ballet dancer tying her shoes",
    "a yellow submarine above a coral reef with many small fish",
    "an old wooden door with peeling green paint",
    "night sky with the milky way above a mountain lake, long exposure",
    "a chess board in the middle of a game, seen from the side",
    "a girl with red hair and freckles smiling, studio portrait",
    "a medieval castle made of ice, fantasy illustration, highly detailed",
    "vintage travel poster of a seaside town with sailing boats",
    "a slice of chocolate cake with raspberries on a white plate",
    "rain on a window, blurred city lights behind it",
    "a flock of birds over a field at dawn",
    "pixel art of a knight fighting a dragon",
    "a motorcycle parked in front of a diner, 1950s, faded colours",
    "a potter shaping a bowl with both hands, clay on the fingers",
    "a snowy owl on a fence post looking into the camera",
    "plan of a garden with a round pond, seen from above, coloured pencil",
    "a row of colourful beach huts under a grey sky",
    "a scientist looking through a microscope, cold blue light",
    "bunch of white roses in a glass vase, dark background, baroque still life",
    "a whale",
    "a train station hall with a large clock, people in motion blur",
    "a green parrot eating a slice of mango",
    "origami crane made of newspaper on a black table",
    "a log cabin with smoke from its chimney, first snow, evening",
    "a boxer resting in the corner of the ring, black and white, high contrast",
    "an abstract painting of circles and triangles in blue, gold and white",
    "a tractor in a wheat field, dust in the low sun",
    "two cups, a spoon and a lemon on a checked tablecloth",
    "a futuristic city with hanging gardens and flying trams, wide angle",
    "a shop sign with the picture of a blue fish",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one a line; empty lines are left out.

    Raises:
        ConfigError: The file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts {path}: the file is empty; write one prompt a line")
    return prompts
