"""COCO's 80 categories: the group of each, how many of it are called, and what it is for.

Groups are the supercategories of instances_*.json. The uses are general knowledge in our own words; the template
generator tells them where a plan asks for more than can be seen.
"""

GROUPS = {
    "person": ["person"],
    "vehicle": ["bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"],
    "outdoor": ["traffic light", "fire hydrant", "stop sign", "parking meter", "bench"],
    "animal": ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"],
    "accessory": ["backpack", "umbrella", "handbag", "tie", "suitcase"],
    "sports": ["frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
               "surfboard", "tennis racket"],
    "kitchen": ["bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"],
    "food": ["banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"],
    "furniture": ["chair", "couch", "potted plant", "bed", "dining table", "toilet"],
    "electronic": ["tv", "laptop", "mouse", "remote", "keyboard", "cell phone"],
    "appliance": ["microwave", "oven", "toaster", "sink", "refrigerator"],
    "indoor": ["book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"],
}  # fmt: skip
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

USES = {  # "A bicycle is …"; of what is always several, "Skis are …"
    "bicycle": "driven by pedals and needs no fuel, which makes it useful for short ways in towns",
    "car": "built to carry a few people on roads and is the commonest vehicle in many countries",
    "motorcycle": "a vehicle with an engine and two wheels; riders wear helmets because nothing else protects them",
    "airplane": "held in the air by its wings and crosses oceans within hours",
    "bus": "a way of carrying many passengers along a fixed route, so that fewer cars are needed",
    "train": "a row of coupled vehicles on rails, which roll with little friction",
    "truck": "made for carrying goods and is often the last link between a warehouse and a shop",
    "boat": "kept afloat because it displaces as much water as it weighs",
    "traffic light": "a signal that lets streams of traffic cross in turn: red for stop, green for go",
    "fire hydrant": "where the fire brigade connects its hoses to the water mains",
    "stop sign": "an order to every driver to halt and give way; its eight sides can be told even from behind",
    "parking meter": "a machine that takes money for the time a vehicle stands in a place",
    "bench": "a seat for several people, often put where there is something to look at",
    "bird": "an animal with feathers and a beak that lays eggs; most kinds can fly",
    "cat": "a hunter by nature that sees well in dim light and sleeps for more than half of the day",
    "dog": "the first animal that people tamed, descended from wolves, and smells far better than we do",
    "horse": "an animal that can sleep standing and was the fastest way to travel for thousands of years",
    "sheep": "kept in flocks for wool, milk and meat and is shorn about once a year",
    "cow": "an animal that chews its food twice, as its stomach has four parts",
    "elephant": "the largest animal on land and breathes, drinks and grasps with its trunk",
    "bear": "an animal that eats almost anything; many kinds sleep through the winter",
    "zebra": "known for stripes, which differ from animal to animal and seem to confuse biting flies",
    "giraffe": "the tallest animal alive and reaches leaves that no other grazer can",
    "backpack": "a bag worn on both shoulders, which leaves the hands free and spreads the weight",
    "umbrella": "a folding roof of cloth against rain, and in some places against the sun",
    "handbag": "carried by hand or over one shoulder and holds small things such as keys and money",
    "tie": "a strip of cloth knotted under the collar and is usually worn at work or on formal occasions",
    "suitcase": "a stiff bag for clothes on a journey",
    "frisbee": "a disc that stays in the air because it spins and its shape gives it lift",
    "skis": "worn under the boots to glide over snow without sinking in",
    "snowboard": "a single board on which both feet are strapped to ride down snow",
    "sports ball": "what a game turns around; its size and weight are laid down in the rules",
    "kite": "held up by the wind while a line keeps it at the right angle",
    "baseball bat": "a club of wood or metal with which the batter hits the ball",
    "baseball glove": "a leather glove that spreads the shock of a fast ball over the hand",
    "skateboard": "a board on four wheels that turns when the rider leans to one side",
    "surfboard": "a board on which a surfer rides the front of a breaking wave",
    "tennis racket": "strung with a net of cords whose tension decides how fast and exactly the ball comes off",
    "bottle": "a vessel with a narrow neck, so that it can be closed and poured from",
    "wine glass": "held by its stem, which keeps the hand from warming the wine",
    "cup": "a small vessel for drinks, with a handle where they are hot",
    "fork": "used to hold or lift food; in Europe it became common only in the last few centuries",
    "knife": "one of the oldest tools and cuts because its edge puts all force on a thin line",
    "spoon": "used for whatever would run through a fork, such as soup",
    "bowl": "a round open dish for food that would run off a plate",
    "banana": "a fruit rich in potassium that is picked green and ripens on the way",
    "apple": "a fruit of temperate regions of which there are thousands of varieties",
    "sandwich": "a filling between slices of bread and can be eaten without knife and fork",
    "orange": "a citrus fruit rich in vitamin C",
    "broccoli": "a vegetable whose green heads are flowers that have not opened",
    "carrot": "a root that owes its colour to carotene, from which the body makes vitamin A",
    "hot dog": "a sausage in a long bun, a usual snack at sports grounds",
    "pizza": "a flat bread with toppings baked in a very hot oven and comes from Naples",
    "donut": "a sweet ring of dough that is fried in fat",
    "cake": "baked for celebrations in many cultures, often with candles for birthdays",
    "chair": "a seat with a back for one person",
    "couch": "an upholstered seat for several people, usually the centre of a living room",
    "potted plant": "kept indoors for its looks and needs light and water within limits",
    "bed": "where people spend about a third of their lives",
    "dining table": "where people gather to eat, so that its size hints at the number of guests",
    "toilet": "flushed with water into a sewer; a bend in its pipe keeps smells out",
    "tv": "a screen for moving pictures that come by air, cable or network",
    "laptop": "a computer with its own battery, screen and keyboard that can be used anywhere",
    "mouse": "used to move a pointer on a screen",
    "remote": "used to operate a device from a distance, mostly by infrared light",
    "keyboard": "used to type; the order of its keys goes back to mechanical typewriters",
    "cell phone": "a telephone that talks to radio masts and has become a small computer",
    "microwave": "an oven that heats food by making its water molecules turn",
    "oven": "a closed chamber in which hot air bakes or roasts food",
    "toaster": "used to brown slices of bread between glowing wires",
    "sink": "a basin with a drain for washing hands or dishes",
    "refrigerator": "kept at a few degrees above freezing so that food spoils slowly",
    "book": "a stack of bound pages that can be read without any device",
    "clock": "used to show the time",
    "vase": "a vessel for cut flowers, which last longer in water",
    "scissors": "used to cut by sliding two blades past each other",
    "teddy bear": "a soft toy named after the American president Theodore Roosevelt",
    "hair drier": "used to blow heated air over wet hair",
    "toothbrush": "used to remove plaque; dentists advise doing so twice a day",
}
ALWAYS_SEVERAL = ("skis", "scissors")
IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis", "scissors": "scissors",
             "broccoli": "broccoli"}  # fmt: skip
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


def plural(name):
    """The plural of a category: str."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def counted(name, number):
    """A number of things in words: "one dog", "two dogs", "13 dogs"."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {name if number == 1 else plural(name)}"


def one_of(name):
    """A thing with its article: "a dog", "an apple", "skis"."""
    if name in ALWAYS_SEVERAL:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
