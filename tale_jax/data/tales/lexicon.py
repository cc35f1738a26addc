"""The words of the tales: scenes to say, and tables of what fits what.

`grammar.py` has the rules, this file the writing. A scene is a tuple of sentences that may be told at that point. In a
sentence, `{role}` is filled once and remembered for the rest of the tale, `{~list}` is filled afresh each time,
`{a role}` puts the right article before it, and a capital (`{He}`, `{A role}`) begins a sentence.

Two habits keep every tale readable in exactly one way: the sentences of a scene (and of scenes offered together) must
differ before their first open slot, and fillers of one slot may not begin one another. The tests hold both.
"""

# The tables stay as dense as they are read.
# fmt: off

# Who there is ---------------------------------------------------------------------------------------------------------

NAMES = {
    "girl": (
        "Mira", "Tilda", "Nora", "Ada", "Juno", "Elsie", "Greta", "Hazel", "Ines", "Lotta", "Maud", "Willa", "Wren",
        "Pia", "Stella", "Fern",
    ),
    "boy": (
        "Tobin", "Otto", "Finn", "Jonas", "Emil", "Hugo", "Bram", "Felix", "Ravi", "Anton", "Milo", "Ned", "Jasper",
        "Leo", "Oskar", "Theo",
    ),
}
PRONOUNS = {
    "girl": {"child": "girl", "he": "she", "him": "her", "his": "her"},
    "boy": {"child": "boy", "he": "he", "him": "him", "his": "his"},
}

# animal: (how it is met, what the hero does about it, the obstacle it can beat)
ANIMALS = {
    "otter": ("tangled in an old fishing net", "untied the knots one by one", "river"),
    "beaver": ("with a splinter in its paw", "drew it out very gently", "river"),
    "heron": ("with a fishbone stuck in its throat", "pulled it out with two careful fingers", "river"),
    "owl": ("blinking in the bright sunlight", "made it a hat of leaves", "dark"),
    "bat": ("lying there like a lost glove", "hung it up again, upside down", "dark"),
    "firefly": ("locked in a jam jar", "unscrewed the lid", "dark"),
    "mouse": ("shivering in a wet boot", "dried it from nose to tail", "gate"),
    "mole": ("that could not find its own front door", "led it home by one velvet paw", "gate"),
    "magpie": ("with fresh paint on its tail", "wiped every feather clean", "gate"),
    "goat": ("with its horns caught in a fence", "wiggled the horns free", "cliff"),
    "eagle": ("wrapped up in kite string", "unwound it, round after round", "cliff"),
    "spider": ("drowning in a puddle", "fished it out with a straw", "cliff"),
    "bear": ("with a bee sting on its nose", "patted cool mud on the sting", "boulder"),
    "donkey": ("carrying far too many pots", "took half of the load", "boulder"),
    "badger": ("whose hole was full of leaves", "swept the leaves away", "boulder"),
    "dog": ("that nobody had patted all week", "scratched it behind both ears", "fog"),
    "goose": ("with its head in a bucket", "pulled until the bucket went pop", "fog"),
    "bee": ("too cold to fly", "warmed it in two cupped hands", "fog"),
}
CALLS = {
    "whistle twice": "whistled twice",
    "clap your hands": "clapped",
    "stamp three times": "stamped three times",
    "shout my name": "shouted its name",
    "ring a bell": "rang a bell",
    "sing a little": "sang a little",
}

# What goes wrong, and what puts it right ------------------------------------------------------------------------------

# trouble at home: (what will help, who has it, the scene that ends it)
NEEDS = {
    "caught a cough that rattled the plates": ("jar of honey", "beekeeper", "cough"),
    "could not sleep a wink": ("bag of lavender", "gardener", "sleep"),
    "broke the kitchen clock": ("tiny steel spring", "clockmaker", "clock"),
    "ran out of salt": ("sack of salt", "sailor", "salt"),
    "complained of cold feet": ("pair of woolen socks", "shepherd", "feet"),
    "sat on the only spectacles": ("pair of lenses", "glassblower", "lenses"),
    "came down with a fever": ("bunch of mint", "herb woman", "fever"),
    "broke the last string of the fiddle": ("silver string", "fiddle maker", "fiddle"),
}
PRICES = {
    "song": "sang one with nine verses",
    "story": "told one with a dragon in it",
    "joke": "told the one about the wet cat",
    "dance": "danced until the cups rattled",
    "kind word": "thought of eleven",
    "riddle": "asked one that is still unsolved",
}
# how a dear thing gets lost: (what is lost that way, where it turns up)
LOSSES = {
    "wind": (
        ("kite", "straw hat", "scarf", "cap"),
        ("on top of the church", "in the tallest pine", "on the highest chimney"),
    ),
    "jackdaw": (
        ("ring", "whistle", "medal", "brooch"),
        ("in the bell tower", "in the hollow oak", "under the roof of the barn"),
    ),
    "stream": (
        ("toy boat", "flute", "wooden duck", "paddle"),
        ("under the old bridge", "beside the mill wheel", "among the reeds"),
    ),
    "pocket": (
        ("key", "coin", "marble", "compass"),
        ("in the haystack", "in the cabbage field", "behind the henhouse"),
    ),
}
# who sells what, and who would want it
GOODS = {
    "baker": {
        "loaf of bread": "who had eaten nothing since dawn",
        "plum cake": "who was tired of turnips",
    },
    "shepherd": {
        "bag of wool": "whose pillow had gone flat",
        "wheel of cheese": "whose mousetrap was empty",
    },
    "fisherman": {
        "rope": "whose bucket had fallen down the well",
        "net": "who was chasing a runaway hen",
    },
    "weaver": {
        "blanket": "who slept in a windy barn",
        "carpet": "whose floor squeaked",
    },
    "tinker": {
        "teapot": "who had guests but no tea",
        "bell": "whose cow kept wandering off",
    },
    "carpenter": {
        "ladder": "whose cat was up a tree",
        "rocking chair": "who had been standing since sunrise",
    },
    "sailor": {
        "spyglass": "who was waiting for a ship",
        "parrot": "who had nobody to talk to",
    },
    "gardener": {
        "pumpkin": "who had soup to make for forty",
        "rosebush": "whose garden was eaten by goats",
    },
    "cobbler": {
        "pair of boots": "whose shoes were all holes",
        "leather ball": "who had seven bored children",
    },
    "lamplighter": {
        "lantern": "who was afraid of the cellar",
        "box of candles": "who liked to read at night",
    },
}
SECRETS = {
    "captain": "could not swim",
    "mayor": "wore a wig",
    "judge": "slept with a stuffed rabbit",
    "teacher": "was afraid of mice",
    "blacksmith": "knitted pink socks",
    "cook": "burned everything but toast",
    "general": "cried at weddings",
}
# where somebody small is stuck: (how it looks, who gets stuck there, what helps, who lends it)
STUCK = {
    "roof": ("stuck on the roof", ("kitten", "young goat"), "ladder", ("painter", "roofer")),
    "well": ("at the bottom of the well", ("puppy", "lamb"), "long rope", ("sailor", "bell ringer")),
    "pond": ("on a plank in the middle of the pond", ("hedgehog", "rabbit"), "rowboat", ("ferryman", "fisherman")),
    "bog": ("up to its neck in the bog", ("calf", "piglet"), "broad board", ("carpenter", "cartwright")),
    "thorns": ("caught in the thorns", ("fawn", "lost sheep"), "pair of shears", ("tailor", "barber")),
    "chimney": ("stuck in the chimney", ("squirrel", "baby owl"), "broom", ("sweep", "cleaner")),
}

# What fills a slot when nothing narrower is asked for -----------------------------------------------------------------

WORDS: dict[str, tuple[str, ...]] = {
    "shape": (
        "crooked", "tall", "narrow", "noisy", "drafty", "cozy", "lopsided", "whitewashed", "rickety", "sunny",
        "haunted", "tidy",
    ),
    "house": (
        "cottage", "windmill", "houseboat", "toy shop", "hut", "wagon", "inn", "tent", "farmhouse", "attic",
        "greenhouse", "tree house",
    ),
    "water": ("river", "sea", "lake", "canal", "harbor", "mill pond", "bay", "waterfall"),
    "trait": (
        "curious", "stubborn", "quiet", "cheerful", "freckled", "barefoot", "sleepy", "bold", "dreamy", "polite",
        "restless", "clumsy", "patient", "thoughtful", "lively", "serious",
    ),
    "habit": (
        "collected odd buttons", "whistled like a kettle", "talked to snails", "never walked if skipping would do",
        "asked questions even of chairs", "kept a toad in a teacup", "counted stars instead of sheep",
        "sang to the soup", "always wore two different stockings", "feared nothing but geese",
        "gave every cloud a name", "jumped into every puddle", "read books upside down", "drew maps of the kitchen",
        "said good night to the furniture", "ate the crust first", "wrote letters to the moon",
        "knew eleven words in goose", "climbed everything twice", "saved string for later",
        "hiccuped at every lie", "believed in dragons on weekdays", "walked backward up the stairs",
        "named all the ducks Robert",
    ),
    "elder": ("grandmother", "grandfather", "aunt", "uncle", "mother", "father"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "weather": (
        "windy", "frosty", "golden", "rainy", "misty", "bright", "gray", "snowy", "mild", "stormy", "sunny", "chilly",
    ),
    "season": ("spring", "summer", "autumn", "winter"),
    "color": ("red", "yellow", "green", "brown", "purple", "white", "orange", "black"),
    "far": (
        "beyond the hills", "behind the mountains", "three valleys away", "past the last signpost",
        "across the moor", "seven miles off", "high above the town", "off the edge of the map",
    ),
    "landmark": (
        "hollow tree", "milestone", "broken cart", "signpost", "scarecrow", "patch of nettles", "mossy log",
        "field of turnips", "blackberry bush", "row of beehives", "forgotten shrine", "heap of stones",
    ),
    "distance": ("a mile", "ten steps", "half an hour", "very far", "long", "two fields"),
    "ground": ("dust", "mud", "clover", "grass", "moss", "dew", "gravel", "daisies"),
    "meal": ("breakfast", "lunch", "teatime", "supper", "bedtime", "noon", "sunset", "dark"),
    "dish": (
        "pea soup", "pancakes", "roast chestnuts", "baked apples", "dumplings", "cabbage rolls", "cherry pie",
        "onion tart", "hot chocolate", "buttered noodles", "potato stew", "fried mushrooms",
        "waffles", "fish cakes", "barley broth", "spinach pie",
    ),
    "treat": (
        "gingerbread", "plum jam", "apple cider", "honey cakes", "walnuts", "fresh butter", "rhubarb", "lemonade",
        "toffee", "ripe pears", "raisins", "cold milk",
    ),
    "garment": ("coat", "apron", "sweater", "jacket", "hat", "shirt", "shawl", "vest"),
    "shiny": ("spoon", "thimble", "bottle top", "mirror", "safety pin", "doorknob", "fork", "buckle"),
    "body": ("nose", "chin", "left ear", "right ear", "knee", "elbow", "forehead", "neck"),
    "deep": ("knees", "belt", "elbows", "chin", "ribs", "shoulders"),
    "raft": ("washtub", "barn door", "wine barrel", "bathtub", "raft", "cradle"),
    "tree": ("birch", "pine", "willow", "poplar", "elm", "maple"),
    "slow": ("snail", "turnip", "teapot", "turtle", "footstool", "statue", "cucumber", "sofa"),
    "big": ("barn", "whale", "church", "haystack", "kitchen", "ship"),
    "thick": ("porridge", "wool", "cream", "pea soup", "pudding", "felt"),
    "smooth": ("plate", "mirror", "boiled egg", "fish", "pearl", "bald head"),
    "muddle": ("left from right", "north from south", "up from down", "road from ditch", "cow from bush"),
    "proud": ("duchess", "bishop", "king", "peacock", "bride", "rooster"),
    "pop": ("cork", "cannonball", "rocket", "comet", "pea", "champion"),
    "silent": ("fish", "stone", "snowflake", "closed book", "candle", "cloud"),
    "margin": ("nose", "whisker", "shoelace", "hair", "sneeze", "toe"),
    "mind": ("wet paint", "cat", "splinters", "baby", "spiders", "doorstep", "handle", "goldfish"),
    "worth": ("old", "lucky", "tiny", "battered", "pretty", "painted", "crooked", "beautiful", "odd", "shiny"),
    "size": ("small", "muddy", "frightened", "furious", "hungry", "fluffy", "bewildered", "round"),
    "red": ("tomato", "beet", "sunset", "lobster", "strawberry", "stove"),
    "sleeper": ("log", "bear", "cat", "sack of flour", "hedgehog", "baby", "king", "dormouse"),
    "folk": (
        "postman", "miller", "milkmaid", "ferryman", "barber", "butcher", "tailor", "librarian",
        "doctor", "grocer", "florist", "plumber", "bookbinder",
    ),
    "chore": (
        "picking plums", "feeding the hens", "hanging up the wash", "peeling potatoes", "doing nothing at all",
        "sweeping the steps", "flying a kite", "watering the beans",
    ),
    "pet": ("Biscuit", "Trouble", "Pepper", "Admiral", "Pudding", "Professor", "Button", "Marmalade"),
    "finish": ("castle", "lighthouse", "chapel", "fairground", "old tower", "market", "crossroads", "vineyard"),
    "prize": (
        "silver cup", "red bicycle", "chocolate cake", "brass trumpet", "velvet cap", "spotted pony", "pocket watch",
        "painted sled",
    ),
    "place": ("gate", "pump", "corner", "fountain", "bakery", "bus stop", "stable", "schoolhouse"),
    "shed": ("woodshed", "henhouse", "church", "bakery", "town hall", "stable", "haystack", "laundry"),
    "look": ("shoes", "hands", "toes", "knees", "buttons", "sleeves"),
    "mood": (
        "kind", "busy", "cheerful", "sleepy", "grumpy", "proud", "tiny", "gentle", "nervous", "lonely", "forgetful",
        "sensible",
    ),
    "count": ("four", "five", "six", "seven", "nine", "twelve", "twenty", "forty"),
}

# The scenes -----------------------------------------------------------------------------------------------------------

SCENES: dict[str, tuple[str, ...]] = {
    "open": (
        "In {a shape} {house} by the {water} lived {a trait} {child} named {hero}, who {habit}.",
        "Once there was {a trait} {child} named {hero}, who lived in {a shape} {house} by the {water} and {habit}.",
        "Not far from the {water}, in {a shape} {house}, lived {hero}, {a trait} {child} who {habit}.",
        "Everyone by the {water} knew {hero}, the {trait} {child} from the {shape} {house} who {habit}.",
    ),
    "close": (
        "They had {~dish} that evening, and nobody left a crumb.",
        "That night {hero} slept like {a ~sleeper}.",
        '"What a day," said {hero}, and went to bed.',
        "Every {~season} the {~folk} tells it again, and each time it gets a little longer.",
        "The moon rose over the {water}, and the whole house smelled of {~dish}.",
        "If you ask about it today, {hero} will only smile and pass you the {~treat}.",
    ),
    # what the slower plots begin with
    "setting": (
        "Most {~weekday}s {hero} had {~dish} with the {~folk} next door.",
        "One {season} the whole town smelled of {~dish} and {~treat}.",
        "For most of the {season} everyone had a cold except {hero} and the {~folk}.",
        "The neighbors were the {~folk}, the {~folk} and {~count} hens.",
        "For breakfast {hero} had {~dish} and half of the {~treat}.",
        "{Hero} owned {a ~color} {~garment}, {~count} marbles and {a ~shiny}.",
        "On weekdays {hero} helped the {~folk}, and was paid in {~treat}.",
        "{His} best friends were {a ~mood} cat and the {~folk}.",
    ),
    # a kindness on the way, an obstacle, and the kindness repaid
    "meet": (
        "On the way {hero} came upon {a ~size} {animal} {trouble}.",
        "Beside {a ~landmark} {hero} found {a ~size} {animal} {trouble}.",
        "At the next bend was {a ~size} {animal} {trouble}.",
        "{Hero} had not gone {~distance} when {he} met {a ~size} {animal} {trouble}.",
    ),
    "kind": (
        "{Hero} was in a hurry, but {he} {kindness}.",
        '"Hold still," said {hero}, and {he} {kindness}.',
        '"That will not do," said {hero}, who {kindness}.',
        "Nobody else had stopped, so {hero} {kindness}.",
        "So {hero} knelt down in the {~ground} and {kindness}.",
    ),
    "promise": (
        '"If you ever need me, {call}," said the {animal}.',
        '"Should you ever be in trouble, {call}," said the {animal}.',
        '"Need a friend? Just {call}," said the {animal}.',
        'The {animal} bowed. "Just {call}, and I will come."',
    ),
    "river": (
        "Then the road came to a wide river, and the {season} rain had washed the bridge away.",
        "But at the river there was no bridge, only {a ~mood} frog, who knew nothing about bridges.",
    ),
    "dark": (
        "Then the path went into a wood so dark that {he} could not see {his} own {~body}.",
        "But night fell like a lid on a pot, and {he} had only {~count} wet matches.",
    ),
    "gate": (
        "Then {hero} came to an iron gate with a lock as big as {a ~big}.",
        "Then came a high wall with {a ~color} gate, locked, and nobody answered the bell.",
    ),
    "cliff": (
        "Then the road stopped at a cliff as smooth as {a ~smooth}.",
        "But the way led up a cliff, and {he} knew {~count} reasons not to climb it.",
    ),
    "boulder": (
        "Then {hero} found the road blocked by a boulder as big as {a ~big}.",
        "But a boulder had rolled onto the path, and the {~mood} crow on top would not move.",
    ),
    "fog": (
        "Then a fog came down, as thick as {~thick}, and the road was gone.",
        "But a white fog rolled in, and soon {he} could not tell {~muddle}.",
    ),
    "call": (
        "So {hero} {called}.",
        "In the end {hero} remembered the {animal} and {called}.",
        "{Hero} took a deep breath and {called}.",
        '"Now I need a friend," said {hero}, and {called}.',
    ),
    "otter": ("Up popped the {animal}, pushing {a ~raft}, and {hero} crossed without wetting a sock.",),
    "beaver": ("The {animal} gnawed through {a ~tree}, which fell across the water just like a bridge.",),
    "heron": ("The {animal} knew every stone under the water, and led {him} across in {~count} long steps.",),
    "owl": ("Down floated the {animal}, who could see {a ~shiny} at midnight, and led the way.",),
    "bat": ("The {animal} squeaked at every root and rock, and {hero} bumped only {his} {~body}.",),
    "firefly": ("The {animal} came with {~count} hundred cousins, and the path lit up like a birthday cake.",),
    "mouse": ("The {animal} slipped under the gate and opened the lock from inside with {a ~shiny}.",),
    "mole": ("The {animal} dug a tunnel, and {hero} crawled through with {~ground} in {his} hair.",),
    "magpie": ("The {animal}, who collects such things, brought the key, and {a ~shiny} as well.",),
    "goat": ('"Stairs," said the {animal}, looking up, and carried {him} to the top in {~count} jumps.',),
    "eagle": ("The {animal} carried {him} up by the {~garment}, as gently as an egg.",),
    "spider": ("The {animal} spun a rope strong enough for {a ~proud}, and up {hero} went.",),
    "bear": ("The {animal} yawned, leaned on the boulder and rolled it away like {a ~pop}.",),
    "donkey": ("The {animal} pulled, for once without arguing, and the boulder rolled into the {~ground}.",),
    "badger": ("The {animal} dug so fast that the boulder sank into the {~ground} with a sigh.",),
    "dog": ("The {animal} put its nose down and followed the road, which smelled of {~treat}.",),
    "goose": ("The {animal} marched ahead, honking at every step, and {hero} followed past {a ~landmark}.",),
    "bee": ("The {animal} flew in a line as straight as {a ~tree}, and {hero} followed the hum.",),
    # a journey to fetch something
    "fetch": (
        "Early one {~weather} morning {his} {~mood} {elder} {ailment}.",
        "But one {season} day {his} {~mood} {elder} {ailment}.",
        "Then, on {a ~weather} {weekday}, {his} {~mood} {elder} {ailment}.",
    ),
    "need": (
        "For that one needs {a cure}, so {hero} set out for the {keeper} {far}.",
        '"Only {a cure} from the {keeper} {far} will help," said {hero}, and off {he} went.',
        "The {keeper} {far} had {a cure}, so {hero} packed {~treat} and went.",
    ),
    "pay": (
        '"That costs {a price}," said the {keeper}, so {hero} {paid} and ran home.',
        "The {keeper} wanted no money, only {a price}, and {hero} {paid} and ran home.",
        '"For {a price} it is yours," said the {keeper}. {Hero} {paid} and ran home.',
    ),
    "cough": ("After {~count} spoons the cough was gone, and the plates hung still.",),
    "sleep": ("{His} {elder} slept for two days and woke up asking for {~dish}.",),
    "clock": ("Tick, said the clock, and then, after some thought, tock, and it was {~meal}.",),
    "salt": ("The {~dish} had never tasted so good, and even the cat asked for more.",),
    "feet": ("Soon ten cold toes were as warm as {~dish}.",),
    "lenses": ('"How you have grown," said {his} {elder}. "And who painted the {~place}?"',),
    "fever": ("The tea tasted like {~ground}, but the fever left by the back door.",),
    "fiddle": ("There was music until midnight, and {~count} neighbors came in to dance.",),
    # a race, and somebody who stopped on the way
    "race": (
        "Every {season} the children raced to the {finish}, and the prize was {a prize}.",
        "The great race to the {finish} was on {weekday}, and the winner would get {a prize}.",
        "That year the prize in the race to the {finish} was {a prize}.",
    ),
    "rival": (
        '"You could not outrun {a ~slow}," said {rival} at the start.',
        "Beside {him} at the start stood {rival}, who had long legs and {~color} shoes.",
        '"I have already won," said {rival}, who had trained with {a ~mood} horse.',
    ),
    "past": (
        "{Rival} ran past with {~color} ribbons flying and did not look back.",
        "Meanwhile {rival} was {~count} hills ahead.",
        '"Slowpoke!" called {rival} from far ahead.',
    ),
    "win": (
        '"Come along," {he} told {rival}, who was stuck there too. They reached the {finish} together and '
        "shared the {prize}.",
        "{Hero} won by {a ~margin} and gave the {prize} to the {animal}, who had no use for it but was deeply touched.",
        '{Hero} was first. "But you stopped!" cried {rival}. "That is how I won," said {hero}, and held up '
        "the {prize}.",
    ),
    # a dear thing lost, and asked after, and found
    "lost": (
        "{His} dearest possession was {a worth} {thing}, a present from {his} {elder}.",
        "What {hero} loved best was {a worth} {thing} that had once belonged to {his} {elder}.",
        "No one ever saw {him} without the {worth} {thing} from {his} {elder}.",
    ),
    "wind": (
        "But on {a ~weather} {weekday} the wind took the {thing} and threw it over the rooftops.",
        "Then a gust came round the corner of the {~shed} and ran off with the {thing} like a puppy.",
    ),
    "jackdaw": (
        "But one {~weather} morning a jackdaw hopped in at the window, said thank you, and took the {thing}.",
        "Then a jackdaw, who already owned {a ~shiny}, saw the {thing} on the windowsill, and that was that.",
    ),
    "stream": (
        "But while {hero} was {~chore}, the stream picked up the {thing} and carried it round the bend.",
        "Then {hero} slipped on a wet {~color} stone. {He} got out of the stream, but the {thing} did not.",
    ),
    "pocket": (
        "But there was a hole in {his} {~garment}, and by {~meal} the {thing} was gone.",
        "Then {hero} turned a somersault in the {~ground}, and afterward {he} no longer had the {thing}.",
    ),
    "ask": (
        "{Hero} asked the {one}, who knew nothing, but knew that the {two} knew everything.",
        '"Have you seen my {thing}?" {he} asked the {one}. "Not I," said the {one}, "but try the {two}."',
        'The {one} looked under a hat and shook {a ~mood} head. "Ask the {two}," said the {one}.',
    ),
    "hint": (
        '"I saw it {spot}," said the {two}, pointing with {a ~shiny}.',
        'The {two} scratched {a ~mood} chin and said, "Look {spot}."',
        '"Things like that end up {spot}," said the {two}. "Mine always do."',
    ),
    "wind found": (
        "{He} climbed up, with {his} heart going like a drum, and there hung the {thing}, waving.",
        "No ladder was long enough, so {hero} waited until the wind got bored and dropped it on {his} {~body}.",
    ),
    "jackdaw found": (
        "{Hero} held up {a ~shiny}, which shone even brighter, and the jackdaw was happy to trade.",
        "There it lay, between {a ~shiny} and {a ~shiny}, and {hero} left a note to thank the jackdaw for its care.",
    ),
    "stream found": (
        "{Hero} waded in up to the {~deep}, and there was the {thing}, with {a ~mood} crab sitting on it.",
        "{Hero} lay on {his} stomach and fished out first {a ~shiny}, then an eel, and then the {thing}.",
    ),
    "pocket found": (
        "{Hero} crawled about until {~meal} with {~ground} in {his} ears, and suddenly something twinkled.",
        "There sat {a ~mood} hen on the {thing}, hoping it would hatch, and {hero} had to apologize.",
    ),
    "safe": (
        '"Did you lose something today?" asked {his} {elder}. "Only for a while," said {hero}.',
        "{Hero} wrote {his} name on the {thing}, in case it ever went traveling again.",
        "{Hero} took {~treat} to the {two} as thanks, and some to the {one} for trying.",
    ),
    # a trade, and another, and another
    "wish": (
        "Tomorrow was {his} {elder}'s birthday, and there was only one wish: {a goal}.",
        "All {his} {elder} wanted in the world was {a goal}.",
        "Now, {his} {elder} had dreamed of {a goal} for {~count} years.",
    ),
    "start": (
        "{Hero} had no money, only {a thing}, but {he} put on {~color} boots and went to market.",
        '"I have {a thing} and two good feet," said {hero}. "That is a start."',
        "Under the bed {hero} found {a thing}, which was better than nothing, and off {he} went before {~meal}.",
    ),
    "trade one": (
        'First came {a ~mood} {one} {reason}. "Take my {thing}," said {hero}, and got {a gift} for it.',
        "At the {~place} stood {a ~mood} {one} {reason}, so the {thing} went one way and {a gift} came the other.",
        "By the {~place} {a ~mood} {one} {reason} was glad to get the {thing} and paid with {a gift}.",
    ),
    "trade two": (
        "Then {a ~mood} {two} {reason} begged for the {gift} and offered {a swap}.",
        "Next {hero} gave the {gift} to {a ~mood} {two} {reason} and came away with {a swap}.",
        '"Is that {a gift}?" cried {a ~mood} {two} {reason}. "I will give you {a swap} for it!"',
    ),
    "trade three": (
        "And who should come along but {a three} {reason}? So {hero} got {a goal} for the {swap}.",
        '"My {swap} for your {goal}," {hero} said to {a three} {reason}, and it was done by {~meal}.',
        "So it was that {a three} {reason} got the {swap} and {hero} got the {goal}.",
    ),
    "gift": (
        '"How did you pay for it?" asked {his} {elder}. "With {a thing}," said {hero}, "more or less."',
        "{His} {elder} hugged first {hero}, then the {goal}, and then {hero} again.",
        '"Just what I wanted," said {his} {elder}. "Now I must think of a new wish."',
    ),
    # a secret, and the way it went
    "secret": (
        '"Can you keep a secret?" asked {friend} one {~weather} {weekday}, and whispered that the {subject} {fact}.',
        "Behind the {~shed}, {friend} told {him} a secret: the {subject} {fact}.",
        "There was one secret in town, and {friend} knew it: the {subject} {fact}. By {~meal} {hero} knew it too.",
    ),
    "vow": (
        "{Hero} promised to be as silent as {a ~silent}.",
        '"I will not tell a soul," said {hero}, and meant it until {~meal}.',
        "But a secret itches like {~thick}, and {hero} could not sit still.",
    ),
    "tell": (
        "{Hero} told only {second}, and only in a whisper.",
        "Then {hero} met {second} at the {~place}, and out it slipped.",
        '"Promise not to tell," {hero} said to {second}, and told.',
    ),
    "pass": (
        "{Second} told nobody but the {third}, over {~treat}.",
        "The {third} heard it from {second}, and promised to forget it by {~meal}.",
        "{Second} told it to the cat, but the {third} was standing behind the cat.",
    ),
    "out": (
        "The {third} told {~count} people, and one of them was the {subject}.",
        "Soon the whole town knew, and the last to hear that everybody knew was the {subject}.",
        "So the {third} could not look at the {subject} without giggling.",
    ),
    "trace": (
        '"Who told you?" asked the {subject}. The {third} pointed at {second}, {second} pointed at {hero}, and '
        "{hero} studied {his} {~look}.",
        "The {subject} went from the {third} to {second}, and from {second} to {hero}, who turned as red as {a ~red}.",
        '"I have it from {second}," said the {third}. "And I from {hero}," said {second}. {Hero} looked for a '
        "hole to hide in.",
    ),
    "sorry": (
        '"It was me," said {hero}, "and I am sorry."',
        "{Hero} said sorry to the {subject}, and sorry to {friend}, and meant both.",
        '"I am sorry," {hero} said, and offered the {subject} some {~treat}.',
    ),
    "captain": ("So the town taught the {subject} to swim, beginning in {a ~raft}.",),
    "mayor": ("The {subject} laughed, hung the wig on {a ~landmark}, and felt much cooler.",),
    "judge": ("From then on the rabbit came to court too, and wore {a ~color} bow.",),
    "teacher": ("So the class brought the {subject} one {~mood} mouse, and bit by bit the fear wore off.",),
    "blacksmith": ('"I have {~count} pairs left," said the {subject}, and nobody in town had cold feet again.',),
    "cook": ("So the town came to eat toast with {~treat}, and the {subject} became famous.",),
    "general": ("Ever since, the {subject} has been asked to every wedding, and brings {~count} handkerchiefs.",),
    # somebody small in a bad place
    "cry": (
        "Early on {weekday} {hero} heard a small cry and found {a ~size} {victim} {stuck}.",
        "While {hero} was {~chore}, {he} heard somebody weeping. It was {a ~size} {victim} {stuck}.",
        "Ever since dawn on {weekday} something had been squeaking, and {hero} found {a ~size} {victim} {stuck}.",
    ),
    "roof try": ("{Hero} put out a dish of {~treat}, but the {victim} only looked down and cried louder.",),
    "well try": ("{Hero} let down {his} {~garment} by one sleeve, but the well was deeper than that.",),
    "pond try": ("{Hero} waded in, but the water came up to {his} {~deep} and kept on coming.",),
    "bog try": ("{Hero} pulled, and the bog pulled back, and the bog had more practice than {a ~proud}.",),
    "thorns try": ("{Hero} reached in with both hands and got nothing but {~count} scratches.",),
    "chimney try": ("{Hero} called up the chimney and got no answer but soot, right on the {~body}.",),
    "borrow": (
        'So {hero} ran to the {~mood} {owner} for {a tool}. "Bring it back by {meal}," said the {owner}.',
        '"Take my {tool}," said the {~mood} {owner}, "but mind the {~mind}."',
        "Luckily the {~mood} {owner} had {a tool}, and lent it for a promise of {~treat}.",
    ),
    "roof": (
        "{Hero} climbed up, tucked the {victim} into {his} {~garment} and came down with both eyes shut.",
    ),
    "well": ("{Hero} tied the rope to {a ~tree}, climbed down, and came up wearing the {victim} like a scarf.",),
    "pond": ("{Hero} rowed in {~count} circles, then in a line, and lifted the {victim} aboard.",),
    "bog": ("{Hero} laid the board on the mud, crawled out, and the {victim} came loose like {a ~pop}.",),
    "thorns": ("Snip by snip {hero} cut a door, and out walked the {victim}, as proud as {a ~proud}.",),
    "chimney": ("{Hero} pushed gently from below, and the {victim} shot out at the top like {a ~pop}.",),
    "return": (
        "{Hero} brought the {tool} back to the {owner}, along with some {~treat}.",
        "The {owner} got the {tool} back before {meal}, a little dirty and much admired.",
        '"Did it help?" asked the {owner} when {he} brought the {tool} back. "Ask the {victim}," said {hero}.',
    ),
    "after": (
        "The {victim} followed {him} home and has slept on {his} feet ever since.",
        "From that day on the {victim} walked behind {him} everywhere, even to the {~place}.",
        '"What will you call it?" asked {his} {elder}. "{~pet}," said {hero}.',
    ),
}
