"""Captions to calibrate on: plain descriptions, written for this package."""

from pathlib import Path

from mpqdm_fx.errors import ConfigError

__all__ = ["DEFAULT_PROMPTS", "SOUND_PROMPTS", "read_prompts"]

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

#: The same for what is heard: noises, instruments, music with its tempo, places.
SOUND_PROMPTS: tuple[str, ...] = (
    "a dog barking twice",
    "128 BPM tech house drum loop with a deep bass and crisp hats",
    "rain on a tin roof, distant thunder",
    "a slow piano melody in a minor key, soft pedal, small room",
    "footsteps on gravel, a gate creaks open",
    "warm analogue synth pad, slowly opening filter",
    "a crowd cheering in a stadium",
    "acoustic guitar arpeggio, 90 BPM, recorded close",
    "waves breaking on a pebble beach, gulls",
    "a kick drum",
    "heavy metal guitar riff with double bass drums, 180 BPM",
    "an old car engine that starts on the third try",
    "church bells across a valley in the morning",
    "lo-fi hip hop beat with vinyl noise, 75 BPM, mellow electric piano",
    "glass breaking on a stone floor",
    "a string quartet, tense and fast, short bows",
    "birdsong in a forest at dawn, a brook nearby",
    "a deep male choir holding one chord, long reverberation",
    "typing on a mechanical keyboard",
    "funk bass line, slapped, 105 BPM, dry",
    "a train passing at high speed, horn",
    "ambient drone with bells and tape hiss, very slow",
    "a hammer hitting a wooden board",
    "trumpet solo over a walking bass and brushes, 140 BPM",
    "wind in tall grass",
    "an arcade game sound, short rising notes",
    "trance arpeggio in the style of the nineties, 138 BPM, building up",
    "water poured into a glass",
    "reggae rhythm guitar and organ, off beat, 80 BPM",
    "a clock ticking in an empty hall",
    "an orchestra tuning before a concert",
    "riser and impact, cinematic",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file in UTF-8, one a line; empty lines are left out.

    Raises:
        ConfigError: The file cannot be read, or holds no prompt.
    """
    try:
        # editors on Windows put a mark in front, which is no part of the first prompt
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(
            f"--prompts {path}: this is no text in UTF-8; save it so, one prompt a line"
        ) from None
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--prompts {path}: it cannot be read: {reason}; give a text file with one prompt a "
            f"line"
        ) from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts {path}: the file is empty; write one prompt a line")
    return prompts
