"""A combinatorial generator of short children's stories, so that the model may be asked for a story about something.

A story is a plot (a list of beats), a cast (hero, helper), a thing and a place. Every beat offers several sentences;
slots are filled from a :class:`Cast`, so names, pronouns and articles always agree. Everything here was written for
this project; no story is taken from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

ANIMALS = (
    "cat kitten dog puppy rabbit fox bear mouse owl duck duckling frog hedgehog squirrel turtle elephant lion tiger "
    "monkey penguin whale dolphin fish octopus crab bee butterfly ladybird ant snail worm spider horse pony donkey cow "
    "sheep lamb goat pig piglet chicken rooster goose swan crow robin wren sparrow parrot eagle deer wolf badger mole "
    "otter beaver seal camel giraffe zebra hippo rhino kangaroo koala panda raccoon bat lizard snake crocodile "
    "hamster starfish seahorse shark peacock flamingo moose reindeer caterpillar dragonfly firefly cricket dinosaur "
    "donkey llama sloth gorilla cheetah leopard panther falcon hawk pigeon pelican magpie lobster salmon jellyfish mole "
    "ferret skunk yak buffalo antelope gecko toad beetle moth grasshopper kitty bunny chick calf foal puffin raven"
).split()
CREATURES = (
    "dragon unicorn fairy giant troll ghost mermaid elf gnome monster phoenix wizard witch robot alien goblin "
    "ogre yeti genie dwarf vampire werewolf superhero ninja spirit"
).split()
PEOPLE = (
    "girl boy princess prince king queen knight pirate farmer baker sailor gardener teacher painter doctor "
    "astronaut fisherman shepherd clockmaker postman detective musician cook builder nurse firefighter policeman "
    "scientist inventor magician clown dancer singer soldier captain explorer tailor miller chef pilot hunter cowboy "
    "viking grandmother grandfather baby child man woman student emperor carpenter librarian"
).split()
THINGS_ALIVE = "train boat teapot cloud snowman car tractor star kite lantern scarecrow toy spaceship tree".split()

MADE_UP = "robot space snow sea fire cloud moon toy ghost baby mountain ice clockwork paper candy rainbow".split()

OBJECTS = (
    "key ball kite hat book map drum bell lamp lantern ring crown coin apple cake pie button blanket scarf boot shoe "
    "mitten umbrella box basket bottle feather shell stone pebble acorn seed flower rose leaf egg nest star moonstone "
    "mirror clock watch flute violin trumpet guitar whistle paintbrush pencil letter ribbon rope ladder bucket spoon "
    "cup teapot balloon boat wagon bicycle swing doll puppet teddy puzzle treasure diamond pearl wand sword shield "
    "compass telescope magnet candle pillow backpack jar pumpkin carrot cookie sandwich sweater necklace bracelet "
    "snowball sled computer radio camera keyboard machine rocket train car bus truck plane helicopter tent chair table door "
    "window wheel bone nut berry cherry banana lemon cupcake donut chocolate candy bread cheese muffin waffle hammer "
    "spade broom chest flag mask glove sock jacket dress purse bag coat gem ruby emerald statue painting "
    "photo newspaper diary notebook card phone bridge sandcastle tower piano harp cloud rainbow sunflower tulip mushroom"
).split()
MAKEABLE = (  # things one can make by hand, for the plots "build" and "gift"
    "kite hat book map drum bell lamp lantern crown cake pie blanket scarf mitten basket box boat wagon swing doll puppet "
    "puzzle necklace bracelet sweater sled machine rocket train car ladder flute whistle teapot cup mirror clock"
).split()
OBJECT_TRAITS = "red blue golden silver shiny little old magic wooden green yellow pretty bright striped".split()

# A place and the preposition that goes with it.
PLACES: dict[str, str] = {
    "forest": "in", "garden": "in", "village": "in", "meadow": "in", "castle": "in", "city": "in", "jungle": "in",
    "valley": "in", "cave": "in", "desert": "in", "park": "in", "barn": "in", "library": "in", "school": "in",
    "kitchen": "in", "market": "in", "museum": "in", "orchard": "in", "swamp": "in", "zoo": "in", "woods": "in",
    "farm": "on", "island": "on", "mountain": "on", "beach": "on", "hill": "on", "ship": "on", "moon": "on",
    "river": "by", "lake": "by", "sea": "by", "pond": "by", "lighthouse": "at", "bakery": "at", "harbour": "at",
    "ocean": "by", "waterfall": "by", "mill": "at", "circus": "at", "station": "at", "hospital": "in", "rainforest": "in",
    "town": "in", "house": "in", "tower": "in", "palace": "in", "cottage": "in", "playground": "in", "field": "in", "shop": "in",
    "attic": "in", "tree house": "in", "bridge": "by", "volcano": "by", "stream": "by", "airport": "at", "restaurant": "at",
    "train": "on", "roof": "on", "planet": "on", "cliff": "on",
}  # fmt: skip
PLACE_TRAITS = "quiet green sunny big old little beautiful faraway".split()

TRAITS = (
    "little brave kind small curious gentle clever cheerful shy funny young friendly happy quiet lonely lazy grumpy sleepy "
    "silly hungry tiny big old wise magical green blue pink purple white black"
).split()
BOYS = (
    "Tom Max Leo Sam Ben Finn Oscar Jack Theo Hugo Pip Milo Toby Felix Otto Rufus Barnaby Gus Jasper Ollie "
    "Adam Noah Liam Ethan Lucas Henry Daniel David Peter Paul John James Harry Charlie George Arthur Simon Mark Tim Bob Rex Spot"
).split()
GIRLS = (
    "Mia Lily Anna Zoe Ruby Ella Clara Nora Daisy Rosie Poppy Luna Hazel Ivy Tilly Molly Bella Maya Willa June "
    "Emma Olivia Sophie Alice Sarah Lisa Jane Lucy Mary Eva Nina Julia Laura Maria Kate Grace Amy Sally Betty Susan Elsa Lina"
).split()
MALE = "boy prince king knight rooster wizard fisherman postman snowman giant policeman cowboy grandfather man emperor".split()
FEMALE = "girl princess queen witch mermaid fairy cow grandmother woman".split()

THEMES: dict[str, tuple[str, str]] = {  # theme -> (plot, moral)
    "friendship": ("stranger", "a good friend can be very different from you"),
    "sharing": ("share", "things are more fun when you share them"),
    "courage": ("fear", "being brave means trying even when you are afraid"),
    "being brave": ("fear", "being brave means trying even when you are afraid"),
    "kindness": ("rescue", "a little kindness always comes back"),
    "helping others": ("rescue", "helping others makes everyone happy"),
    "honesty": ("found", "it is always best to be honest"),
    "patience": ("wish", "good things come to those who keep trying"),
    "never giving up": ("wish", "you should never give up"),
    "learning": ("wish", "everyone can learn with a little practice"),
    "teamwork": ("build", "many hands make hard work easy"),
    "working together": ("build", "many hands make hard work easy"),
    "a birthday": ("gift", "the best gifts come from the heart"),
    "a party": ("gift", "the best gifts come from the heart"),
    "a race": ("race", "being kind is better than winning"),
    "winning": ("race", "being kind is better than winning"),
    "a mystery": ("mystery", "a strange thing is often a friend you do not know yet"),
    "the night": ("mystery", "the dark is not so scary when you look closely"),
    "a journey": ("journey", "a long road is short with a friend"),
    "an adventure": ("journey", "a long road is short with a friend"),
    "a storm": ("rescue", "friends look after each other when the wind is strong"),
    "a lost toy": ("lost", "you should ask for help when you need it"),
}  # fmt: skip

OPENINGS = (
    "Once upon a time, there was {a_trait} {kind} named {hero}. {He} lived {in_place}.",
    "Once upon a time, {a_trait} {kind} named {hero} lived {in_place}.",
    "Long ago, {in_place}, there lived {a_trait} {kind}. {His} name was {hero}.",
    "There once was {a_trait} {kind} who lived {in_place}. Everyone called {him} {hero}.",
    "{In_place}, there lived {a_trait} {kind} named {hero}.",
    "{hero} was {a_trait} {kind}. {He} lived {in_place} and loved to play outside.",
)
ENDINGS = (
    "From that day on, {hero} and {helper} were the best of friends.",
    "That night, {hero} fell asleep with a big smile.",
    "And they all lived happily ever after.",
    "{hero} went home happy, and {he} never forgot that day.",
    "{hero} and {helper} laughed and played until the sun went down.",
    "It was the best day {hero} ever had.",
)
MORALS = (
    "{hero} learned that {moral}.",
    'And {hero} said, "Now I know that {moral}."',
    "From that day on, {hero} knew that {moral}.",
)

# Every beat is a tuple of alternatives; slots are explained in Cast.slots.
PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        (
            "{hero} had {a_thing} that {he} loved very much.",
            "More than anything, {hero} loved {his} {thing}.",
            "{hero} took {his} {thing} everywhere {he} went.",
        ),
        (
            "One morning, the {noun} was gone!",
            "One day, {hero} woke up and could not find the {noun}.",
            "But one windy day, {hero} lost the {noun}.",
        ),
        (
            "{He} looked under the bed and behind the door, but it was not there.",
            "{He} looked high and low, but {he} could not find it anywhere.",
            "{He} searched all day long. {He} felt very sad.",
        ),
        (
            'Then {hero} met {a_helper} named {helper}. "Why are you sad?" asked {helper}.',
            'Just then, {a_helper} named {helper} came by. "What is wrong?" asked {helper}.',
        ),
        (
            '"I lost my {noun}," said {hero}. "Do not worry," said {helper}. "I will help you look."',
            '"My {noun} is gone," said {hero}. {helper} smiled. "Let us look for it together," {h_he} said.',
        ),
        (
            "They walked and walked. At last, {helper} saw something under a big tree.",
            "They looked behind every rock. Suddenly, {helper} saw something in the tall grass.",
            "They followed some tiny footprints until they came to an old log.",
        ),
        (
            'It was the {noun}! "You found it!" cried {hero}, and {he} jumped for joy.',
            'There was the {noun}! "Thank you, {helper}!" said {hero}, and {he} gave {h_him} a big hug.',
        ),
    ),
    "found": (
        (
            "One day, {hero} found {a_thing} on the ground.",
            "One sunny morning, {hero} saw {a_thing} lying in the grass.",
            "While {he} was out for a walk, {hero} found {a_thing}.",
        ),
        (
            '"How lovely!" said {hero}. "I wonder whose {noun} this is."',
            "{He} wanted to keep it, but {he} knew that it belonged to someone else.",
            '"This {noun} is not mine," {he} thought. "Someone must miss it."',
        ),
        (
            "So {hero} went from door to door and asked everyone about the {noun}.",
            "So {he} picked up the {noun} and set off to find its owner.",
        ),
        (
            "Near an old bridge, {he} met {a_helper} named {helper} who was crying.",
            "After a while, {he} heard someone crying. It was {a_helper} named {helper}.",
        ),
        (
            '"I have lost my {noun}," said {helper}. "My grandmother gave it to me."',
            '"I cannot find my {noun} anywhere," said {helper}.',
        ),
        (
            'With a smile, {hero} held out the {noun}. "Is this yours?" {he} asked.',
            '"Then this must be yours," said {hero}, and {he} gave the {noun} back.',
        ),
        (
            '"Yes! Thank you for being so honest," said {helper}, and {h_he} danced with joy.',
            '{helper} was so happy that {h_he} could not stop smiling. "You are very kind," {h_he} said.',
        ),
    ),
    "wish": (
        (
            "{hero} had one big wish. {He} wanted to learn how to {skill}.",
            "Every day, {hero} dreamed about one thing. {He} wanted to {skill}.",
        ),
        (
            "{He} tried once, and {he} fell down. {He} tried again, and {he} fell down again.",
            "{He} tried and tried, but it was too hard.",
        ),
        (
            '"I will never learn," said {hero} with a sigh.',
            '"Maybe I am too small," {he} thought, and a tear rolled down {his} cheek.',
        ),
        (
            "{A_helper} named {helper} heard {him} and sat down beside {him}.",
            "A friend named {helper} was watching. {helper} was {a_helper}, and {h_he} was very wise.",
        ),
        (
            '"I was not good at it at first," said {helper}. "Take this {thing}. It will bring you luck."',
            '"Do not give up," said {helper}. {h_He} gave {hero} {a_thing}. "Hold it when you feel afraid."',
        ),
        (
            "{hero} held the {noun} and practised every single day.",
            "With the {noun} by {his} side, {hero} practised in the morning and in the evening.",
        ),
        (
            "At last, it worked! {hero} could {skill}!",
            'Then one day, {he} did it. "Look, {helper}, I can {skill}!" {hero} cried.',
        ),
        (
            '"It was not the {noun}," said {helper}. "It was you all along."',
            '{helper} clapped and cheered. "I knew you could do it!" {h_he} said.',
        ),
    ),
    "fear": (
        (
            "{hero} was afraid of {fear}.",
            "There was only one thing that {hero} did not like. {He} was afraid of {fear}.",
        ),
        (
            "Whenever {he} thought of it, {he} hid under a blanket with {his} {noun}.",
            "At night, {he} held {his} {noun} tight and closed {his} eyes.",
        ),
        (
            'One evening, {he} heard a small voice. "Help! Help!" it cried.',
            'One day, a voice called from far away. "Please help me!" it said.',
        ),
        (
            "It was {helper}, {a_helper}, who was stuck and could not get home.",
            "{His} friend {helper}, {a_helper}, was lost and all alone.",
        ),
        (
            "{hero} was scared, but {he} took {his} {noun} and went out to help.",
            '"I am afraid," {hero} thought, "but {helper} needs me." So {he} picked up the {noun} and ran.',
        ),
        (
            "Step by step, {he} walked on. {His} heart went thump, thump, thump.",
            "It was hard, but {he} took one small step, and then another.",
        ),
        (
            "{hero} used the {noun} to show {helper} the way, and soon they were both safe.",
            'At last {he} found {helper} and took {h_him} by the hand. "You came for me!" said {helper}.',
        ),
        (
            '"You are the bravest {kind} I know," said {helper}.',
            "After that, {hero} was not so afraid of {fear} anymore.",
        ),
    ),
    "share": (
        (
            "{hero} had {a_thing}, and {he} was very proud of it.",
            "On {his} birthday, {hero} got {a_thing}.",
        ),
        (
            'A friend named {helper}, {a_helper}, came to play. "May I see your {noun}?" asked {helper}.',
            '{helper}, {a_helper} who lived next door, came by. "May I play with the {noun} too?" {h_he} asked.',
        ),
        (
            '"No! It is mine," said {hero}, and {he} held the {noun} tight.',
            '"No," said {hero}. "I do not want to share." {helper} went away with a sad face.',
        ),
        (
            "{hero} played alone with the {noun}, but soon {he} was bored.",
            "But it was no fun to play alone. {hero} felt lonely.",
        ),
        (
            "{He} looked out of the window and saw {helper} sitting all alone.",
            '"What good is {a_thing} without a friend?" {he} thought.',
        ),
        (
            '{hero} ran outside. "I am sorry, {helper}," {he} said. "Let us play with the {noun} together."',
            'So {hero} took the {noun} to {helper}. "I am sorry," {he} said. "You can have a turn."',
        ),
        (
            "They played all afternoon and laughed and laughed.",
            "{helper} was so happy, and the two of them played until it was dark.",
        ),
    ),
    "journey": (
        (
            "One day, {hero} heard about {a_thing} that was hidden far away.",
            "{hero} had heard that {a_thing} was waiting at the end of the world.",
        ),
        (
            '"I want to see it," said {hero}. So {he} packed a small bag and set off.',
            "The next morning, {he} packed some bread and cheese and began to walk.",
        ),
        (
            "Soon {he} came to a wide river. There was no bridge.",
            "Soon the road was blocked by a huge rock.",
            "After a while, dark clouds came and it began to rain.",
        ),
        (
            'There {he} met {a_helper} named {helper}. "I will help you," said {helper}.',
            '"May I come with you?" asked a voice. It was {helper}, {a_helper}.',
        ),
        (
            "Together they found a way, and they sang songs as they went.",
            "With {helper} beside {him}, {hero} was not tired anymore.",
        ),
        (
            "They walked over hills and through fields until they saw something shining.",
            "At the top of a tall hill, they stopped and looked down.",
        ),
        (
            "It was the {noun}, and it was even more beautiful than they had thought.",
            '"There is the {noun}!" cried {hero}. They ran to it and danced around it.',
        ),
        (
            '"Let us take it home and show everyone," said {helper}.',
            '"The {noun} is lovely," said {hero}, "but the best part was walking with you."',
        ),
    ),
    "build": (
        (
            "One day, {hero} wanted to make {a_thing} all by {himself}.",
            "{hero} had a big plan. {He} wanted to make {a_thing} for everyone {in_the_place}.",
        ),
        (
            "{He} worked and worked, but the {noun} fell apart.",
            "{He} tried all morning, but something was always missing.",
        ),
        (
            '"This is too hard for one {kind}," said {hero}.',
            '"Oh dear," said {hero}. "I cannot do this alone."',
        ),
        (
            '"May I help?" asked {helper}, {a_helper} with a big smile.',
            '{helper}, {a_helper}, came to see what was going on. "I can help," {h_he} said.',
        ),
        (
            "{helper} held the pieces, and {hero} put them together.",
            "{hero} did the first half and {helper} did the second half.",
        ),
        (
            "More and more friends came, and everyone did a little bit.",
            "They worked until the sun went down, and they sang while they worked.",
        ),
        (
            'In the end, the {noun} was ready. "We did it!" they shouted.',
            'At last, the {noun} was done, and it was perfect. "We made it together," said {hero}.',
        ),
    ),
    "stranger": (
        (
            "{hero} was often lonely, because there was nobody to play with.",
            "{hero} had {a_thing}, but {he} did not have a friend.",
        ),
        (
            "One day, {a_helper} named {helper} came to live nearby.",
            "One afternoon, {he} saw {a_helper} sitting by the road. {h_His} name was {helper}.",
        ),
        (
            '"{A_helper_plain} and {a_kind} cannot be friends," everyone said.',
            "{hero} was shy, and {he} did not know what to say.",
        ),
        (
            'But {hero} took {his} {noun} and said, "Hello, would you like to play?"',
            'Then {hero} held out {a_thing}. "This is for you," {he} said.',
        ),
        (
            '"Nobody ever asked me to play before," said {helper}, and {h_he} smiled.',
            '"Thank you! I love it," said {helper}. "Will you be my friend?"',
        ),
        (
            "They played with the {noun} all day, and they told each other funny stories.",
            "{hero} showed {helper} the best place to climb, and {helper} showed {hero} how to whistle.",
        ),
        (
            "They were very different, but that made it even more fun.",
            "Soon everybody could see that they were the best of friends.",
        ),
    ),
    "rescue": (
        (
            "One day, a big storm came. The wind blew and the rain fell.",
            "One cold evening, the sky turned dark and a great storm began.",
        ),
        (
            "{hero} was safe at home with {his} {noun}, but then {he} heard a cry.",
            "{hero} was just putting away {his} {noun} when someone called for help.",
        ),
        (
            "It was {helper}, {a_helper}, who was caught in the mud.",
            "Outside, {a_helper} named {helper} was stuck under a branch.",
        ),
        (
            '"Hold on!" shouted {hero}. "I am coming!"',
            '"Do not be afraid," called {hero}. "I will get you out."',
        ),
        (
            "{hero} had an idea. {He} took the {noun} and ran out into the rain.",
            "Quickly, {he} picked up the {noun} and hurried through the storm.",
        ),
        (
            "With the {noun}, {hero} helped {helper} get free.",
            "{He} pulled and pulled, and the {noun} helped a lot. At last, {helper} was free.",
        ),
        (
            '"You saved me!" said {helper}. They went inside and drank warm milk.',
            '"Thank you, {hero}," said {helper}. "I will never forget this." They sat by the fire until morning.',
        ),
    ),
    "mystery": (
        (
            "One night, {hero} heard a strange sound. Tap, tap, tap.",
            "Every night, there was a strange light {in_the_place}.",
        ),
        (
            '"What can it be?" {he} wondered. {He} took {his} {noun} and went to look.',
            "{hero} was curious. {He} tiptoed outside with {his} {noun} in {his} hand.",
        ),
        (
            "{He} looked behind the bushes, but there was only the wind.",
            "The moon was bright, and the shadows were long.",
        ),
        (
            "Then {he} saw two big eyes in the dark. {hero} almost ran away.",
            "Something moved behind a tree. {hero} held {his} breath.",
        ),
        (
            '"Who is there?" {he} asked. "It is only me," said a soft voice.',
            '"Please do not be scared," said a voice.',
        ),
        (
            "Out came {a_helper} named {helper}. {h_He} was looking for {h_his} way home.",
            "It was {helper}, {a_helper} who could not sleep.",
        ),
        (
            'With the {noun}, {hero} lit the way. "I will walk with you," {he} said.',
            '{hero} laughed. "I thought you were a monster!" {he} said. They shared the {noun} and some cookies.',
        ),
    ),
    "gift": (
        (
            "Tomorrow was the birthday of {his} friend {helper}, {a_helper}.",
            "{hero} was invited to a party. {His} friend {helper}, {a_helper}, had a birthday.",
        ),
        (
            "{hero} wanted to give {h_him} {a_thing}.",
            '"I will give {h_him} {a_thing}," thought {hero}.',
        ),
        (
            "{He} worked on it all day and put it in a box with a ribbon.",
            "{He} saved {his} money for a long time and bought the best one in the shop.",
        ),
        (
            "But on the way to the party, {hero} fell and the {noun} broke.",
            "But on the way, it began to rain, and the {noun} got wet and dirty.",
        ),
        (
            '"Oh no," cried {hero}. "Now I have no gift at all."',
            "{hero} sat down on a stone and cried.",
        ),
        (
            'When {helper} heard about it, {h_he} hugged {him}. "You came! That is the best gift," {h_he} said.',
            '{helper} came and sat beside {him}. "We can mend the {noun} together," {h_he} said.',
        ),
        (
            "Then they ate cake, and everyone sang a happy song.",
            "They mended the {noun} with some string, and it looked better than before.",
        ),
    ),
    "race": (
        (
            "Every year there was a big race, and the winner got {a_thing}.",
            "One day, there was a great race {in_the_place}. The prize was {a_thing}.",
        ),
        (
            '"You are too slow to win," the others said, but {hero} wanted to try.',
            "{hero} was not the fastest, but {he} practised every morning.",
        ),
        (
            '"Ready, steady, go!" Everyone ran as fast as they could.',
            "The bell rang, and the race began.",
        ),
        (
            "Near the end, {hero} was in front! But then {he} saw {helper}, {a_helper}, lying on the ground.",
            "Halfway, {hero} heard a cry. {helper}, {a_helper}, had hurt {h_his} leg.",
        ),
        (
            "{hero} could see the finish, but {he} stopped and went back.",
            '"I must help," said {hero}, and {he} turned around.',
        ),
        (
            "{He} helped {helper} up, and they walked to the finish together. They were the last ones.",
            '"Lean on me," said {hero}. Slowly, they crossed the line side by side.',
        ),
        (
            "Everybody cheered. They gave the {noun} to {hero}, because {he} had the biggest heart.",
            'The judge smiled. "You did not win the race," she said, "but you win the {noun} for being kind."',
        ),
    ),
}
PLOT_MORAL: dict[str, str] = {plot: moral for plot, moral in reversed(THEMES.values())}
SKILLS = "fly|swim|sing|dance|paint|jump high|climb trees|read|skate|whistle|play music|run fast".split("|")
FEARS = "the dark|deep water|thunder|high places|loud noises|the night|big shadows".split("|")


def article(words: str) -> str:
    """``words`` with the right indefinite article before it."""
    vowel = words[0].lower() in "aeiou" and not words.startswith(("uni", "one"))
    return f"{'an' if vowel else 'a'} {words}"


def pronouns(kind: str, rng: random.Random) -> tuple[str, tuple[str, str, str]]:
    """A name and (subject, object, possessive) pronouns for somebody of this kind."""
    male = kind in MALE or (kind not in FEMALE and rng.random() < 0.5)
    return (rng.choice(BOYS), ("he", "him", "his")) if male else (rng.choice(GIRLS), ("she", "her", "her"))


@dataclass
class Cast:
    """Who and what a story is about; anything left empty is chosen at random."""

    hero: str = ""  # kind of hero, as "dragon"
    helper: str = ""  # kind of helper
    thing: str = ""  # an object, without trait
    place: str = ""
    theme: str = ""
    name: str = ""  # the hero's name
    hero_trait: str = ""
    thing_trait: str = ""
    plot: str = ""
    moral: str = ""
    slots: dict[str, str] = field(default_factory=dict)

    def complete(self, rng: random.Random) -> Cast:
        """Choose what is missing and compute the slots of the sentences."""
        if not self.plot:
            handmade = not self.thing or self.thing in MAKEABLE
            plots = [plot for plot in PLOTS if handmade or plot not in ("build", "gift")]
            self.plot = THEMES[self.theme][0] if self.theme else rng.choice(plots)
        self.moral = THEMES[self.theme][1] if self.theme else PLOT_MORAL[self.plot]
        kinds = rng.choice([ANIMALS, ANIMALS, ANIMALS, PEOPLE, CREATURES])
        self.hero = self.hero or rng.choice(kinds)
        while not self.helper or self.helper == self.hero:
            self.helper = rng.choice(ANIMALS)
        asked_thing = bool(self.thing)
        self.thing = self.thing or rng.choice(MAKEABLE if self.plot in ("build", "gift") else OBJECTS)
        name, (he, him, his) = pronouns(self.hero, rng)
        if self.name in BOYS or self.name in GIRLS:
            he, him, his = ("he", "him", "his") if self.name in BOYS else ("she", "her", "her")
        self.name = self.name or name
        h_name, (h_he, h_him, h_his) = pronouns(self.helper, rng)
        while h_name == self.name:
            h_name, (h_he, h_him, h_his) = pronouns(self.helper, rng)
        trait = self.hero_trait or rng.choice(TRAITS)
        self.thing_trait = self.thing_trait or ("" if asked_thing else rng.choice(["", *OBJECT_TRAITS]))
        thing = f"{self.thing_trait} {self.thing}".strip()
        place_trait = "" if self.place else rng.choice(["", *PLACE_TRAITS])
        self.place = self.place or rng.choice(list(PLACES))
        preposition = PLACES[self.place]
        a_place = f"the {self.place}" if not place_trait else article(f"{place_trait} {self.place}")
        if self.place in ("sea", "ocean", "moon", "woods"):  # there is one of these
            a_place = f"the {self.place}"
        h_trait = rng.choice(["", *TRAITS])
        a_helper = article(f"{h_trait} {self.helper}".strip())
        slots = {
            "hero": self.name, "kind": self.hero, "a_kind": article(self.hero), "a_trait": article(trait),
            "he": he, "him": him, "his": his, "himself": "himself" if he == "he" else "herself",
            "helper": h_name, "a_helper": a_helper, "a_helper_plain": article(self.helper),
            "h_he": h_he, "h_him": h_him, "h_his": h_his,
            "thing": thing, "noun": self.thing, "a_thing": article(thing),
            "in_place": f"{preposition} {a_place}", "in_the_place": f"{preposition} the {self.place}",
            "skill": rng.choice(SKILLS), "fear": rng.choice(FEARS), "moral": self.moral,
        }  # fmt: skip
        capitals = {}
        for key, value in slots.items():
            capital = f"h_{key[2:].capitalize()}" if key.startswith("h_") else key.capitalize()
            capitals[capital] = value[:1].upper() + value[1:]
        self.slots = {**capitals, **slots}
        return self

    def begin(self, rng: random.Random) -> str:
        """The opening of the story."""
        return rng.choice(OPENINGS).format(**self.slots)

    def tell(self, rng: random.Random) -> str:
        """The story: one or two paragraphs, 80 to 200 words."""
        beats = [rng.choice(OPENINGS), *(rng.choice(options) for options in PLOTS[self.plot])]
        split = rng.randint(3, len(beats) - 2)
        if self.theme or rng.random() < 0.3:
            beats.append(rng.choice(MORALS))
        beats.append(rng.choice(ENDINGS))
        sentences = [beat.format(**self.slots) for beat in beats]
        return " ".join(sentences[:split]) + "\n\n" + " ".join(sentences[split:])


BARE = (
    "tell me a story|tell me a short story|write a story|write me a short story|can you tell me a story?|i want a story"
    "|Could you tell me a bedtime story?|story please|Please tell me a story.|Once upon a time...|Make up a story."
    "|Do you know a story?|I would like to hear a story.|tell me a fairy tale|read me a story|A story, please!"
    "|let's have a story|Tell a story.|Can you write a short story for my kids?|how about a story?|tell me another story"
).split("|")
ABOUT = (
    "Tell me a story about {x}.|tell me a story about {x}|Write a story about {x}.|write a short story about {x}"
    "|Can you tell me a story about {x}?|Could you write a story about {x}?|a story about {x} please"
    "|Please tell me a short story about {x}.|I want a story about {x}.|Make up a story about {x}.|story about {x}"
    "|Tell me a bedtime story about {x}.|i would like a story about {x}|Do you know a story about {x}?"
    "|Write me a tale about {x}.|tell me a short story with {x}|Once more, a story about {x}.|give me a story about {x}"
    "|tell a story about {x} for children|Can I hear a story about {x}?|how about a story about {x}?"
    "|Write a short children's story about {x}.|Could you please tell me a little story about {x}?|tell us about {x}, as a story"
).split("|")


def request(cast: Cast, asked: str) -> str:
    """The words after "a story about" for the parts of the cast named in ``asked`` (of hero, thing, place, ...)."""
    hero = article(f"{cast.hero_trait} {cast.hero}".strip())
    thing = article(f"{cast.thing_trait} {cast.thing}".strip())
    name, theme, helper = cast.name, cast.theme, article(cast.helper)
    place = cast.slots["in_the_place"]
    return {
        "hero": hero,
        "name": f"{hero} named {name}",
        "hero+thing": f"{hero} and {thing}",
        "hero+helper": f"{hero} and {helper}",
        "hero+place": f"{hero} {place}",
        "thing": thing,
        "place": f"the {cast.place}",
        "theme": theme,
        "hero+theme": f"{hero} and {theme}",
        "lost": f"{hero} and {article('lost ' + cast.thing)}",
        "lost_who": f"{hero} who lost {cast.slots['his']} {cast.thing}",
        "wish": f"{hero} who wants to {cast.slots['skill']}",
        "fear": f"{hero} who is afraid of {cast.slots['fear']}",
    }[asked]


ASKED = (
    "hero hero hero hero name name hero+thing hero+thing hero+thing hero+helper hero+helper hero+place hero+place "
    "thing thing place theme theme hero+theme lost lost lost_who wish fear"
).split()


def any_hero(rng: random.Random) -> str:
    """The kind of a hero; rarer kinds (things that are alive, made-up ones) are included."""
    if rng.random() < 0.06:
        return f"{rng.choice(MADE_UP)} {rng.choice(ANIMALS)}"
    return rng.choice(rng.choice([ANIMALS, ANIMALS, PEOPLE, CREATURES, THINGS_ALIVE]))


def any_name(rng: random.Random) -> str:
    """A common name, or now and then one that nobody ever had, so that the model learns to copy names."""
    if rng.random() < 0.8:
        return rng.choice(BOYS + GIRLS)
    syllables = (rng.choice("bdfgklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return ("".join(syllables) + rng.choice(("", "n", "x", "la", "ro", "sh", "my"))).capitalize()


def story(rng: random.Random, bare: float = 0.12) -> tuple[str, str, Cast]:
    """A request, the story that answers it, and its cast. ``bare``: share of requests that name no subject."""
    cast = Cast()
    if rng.random() < bare:
        cast.complete(rng)
        return rng.choice(BARE), cast.tell(rng), cast
    asked = rng.choice(ASKED)
    if "hero" in asked or asked in ("name", "lost", "lost_who", "wish", "fear"):
        cast.hero = any_hero(rng)
        cast.hero_trait = rng.choice(TRAITS) if rng.random() < 0.3 else ""
    if asked in ("thing", "hero+thing", "lost", "lost_who"):
        cast.thing = rng.choice(OBJECTS)
        cast.thing_trait = rng.choice(OBJECT_TRAITS) if rng.random() < 0.3 and "lost" not in asked else ""
    if "helper" in asked:
        cast.helper = rng.choice(rng.choice([ANIMALS, PEOPLE, CREATURES]))
        cast.plot = rng.choice(list(PLOTS))
    if "place" in asked:
        cast.place = rng.choice(list(PLACES))
    if "theme" in asked:
        cast.theme = rng.choice(list(THEMES))
    if asked == "name":
        cast.name = rng.choice(BOYS) if cast.hero in MALE else rng.choice(GIRLS) if cast.hero in FEMALE else any_name(rng)
    cast.plot = {"lost": "lost", "lost_who": "lost", "wish": "wish", "fear": "fear"}.get(asked, cast.plot)
    cast.complete(rng)
    return rng.choice(ABOUT).format(x=request(cast, asked)), cast.tell(rng), cast
