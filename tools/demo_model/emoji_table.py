"""Which emoji the demo model is trained on, the prompts each one goes by, and the prompts it never sees.

One line per emoji: ``short_name = prompt | other prompt``. ``short_name`` is the emoji's key in
``emoji-datasource-google``; the first prompt is the one used in sample grids.
"""

from __future__ import annotations

_TABLE = """
heart = red heart | heart
orange_heart = orange heart
yellow_heart = yellow heart
blue_heart = blue heart
purple_heart = purple heart
brown_heart = brown heart
black_heart = black heart
grey_heart = grey heart
pink_heart = pink heart
light_blue_heart = light blue heart
broken_heart = broken heart
two_hearts = two hearts
sparkling_heart = sparkling heart
cupid = heart with arrow
heart_on_fire = heart on fire
red_circle = red circle
large_orange_circle = orange circle
large_yellow_circle = yellow circle
large_green_circle = green circle
large_purple_circle = purple circle
large_brown_circle = brown circle
black_circle = black circle
large_red_square = red square
large_blue_square = blue square
large_orange_square = orange square
large_yellow_square = yellow square
large_green_square = green square
large_brown_square = brown square
black_large_square = black square
large_orange_diamond = orange diamond
large_blue_diamond = blue diamond
small_red_triangle = red triangle
closed_book = red book
green_book = green book
blue_book = blue book
grinning = grinning face | happy face
joy = face with tears of joy | laughing face
smile = smiling face | smile
innocent = smiling face with halo | angel face
wink = winking face | wink
blush = blushing face
upside_down_face = upside down face
heart_eyes = smiling face with heart eyes | heart eyes
kissing_heart = face throwing a kiss | kissing face
star-struck = face with star eyes | star eyes
sunglasses = face with sunglasses | cool face
nerd_face = nerd face
neutral_face = neutral face
thinking_face = thinking face
zipper_mouth_face = zipper mouth face
rolling_on_the_floor_laughing = rolling on the floor laughing
sleeping = sleeping face
stuck_out_tongue = face with tongue
cry = crying face
sob = loudly crying face
frowning = frowning face | sad face
open_mouth = surprised face
scream = screaming face
flushed = flushed face
angry = angry face
rage = red angry face | rage
smiling_imp = purple devil face | devil
mask = face with medical mask
nauseated_face = sick green face | nauseated face
exploding_head = exploding head
hot_face = hot face
cold_face = cold blue face | cold face
face_with_cowboy_hat = cowboy hat face | cowboy
partying_face = party face
ghost = ghost
alien = alien
robot_face = robot face | robot
clown_face = clown face | clown
skull = skull
hankey = pile of poo | poo
jack_o_lantern = halloween pumpkin | pumpkin
snowman = snowman
dog = dog face | dog
cat = cat face | cat
mouse = mouse face | mouse
hamster = hamster face | hamster
rabbit = rabbit face | rabbit
fox_face = fox face | fox
bear = bear face | bear
panda_face = panda face | panda
polar_bear = polar bear face | polar bear
koala = koala face | koala
tiger = tiger face | tiger
lion_face = lion face | lion
cow = cow face | cow
pig = pig face | pig
frog = frog face | frog
monkey_face = monkey face | monkey
horse = horse face
wolf = wolf face | wolf
unicorn_face = unicorn face | unicorn
raccoon = raccoon face | raccoon
gorilla = gorilla
elephant = elephant
giraffe_face = giraffe
zebra_face = zebra
hedgehog = hedgehog
bat = bat
sheep = sheep
racehorse = horse
chicken = chicken
hatching_chick = hatching chick
baby_chick = baby chick | chick
bird = bird | blue bird
penguin = penguin
owl = owl
duck = duck
parrot = parrot
flamingo = flamingo
swan = swan
turtle = turtle | green turtle
snake = snake | green snake
crocodile = crocodile
dragon_face = dragon face | dragon
t-rex = dinosaur
whale = whale | spouting whale
dolphin = dolphin
fish = fish | blue fish
tropical_fish = tropical fish
blowfish = blowfish
octopus = octopus
crab = crab | red crab
lobster = lobster
shark = shark
snail = snail
bug = caterpillar
bee = bee
ladybug = ladybug
spider = spider
butterfly = butterfly | blue butterfly
feet = paw prints
tulip = tulip | pink tulip
cherry_blossom = cherry blossom | pink flower
rose = rose | red rose
hibiscus = hibiscus
sunflower = sunflower | yellow flower
bouquet = bouquet of flowers
seedling = seedling
evergreen_tree = evergreen tree
deciduous_tree = tree | green tree
palm_tree = palm tree
cactus = cactus
four_leaf_clover = four leaf clover | clover
maple_leaf = maple leaf
mushroom = mushroom | red mushroom
christmas_tree = christmas tree
apple = red apple | apple
green_apple = green apple
pear = pear | green pear
tangerine = tangerine | orange fruit
lemon = lemon | yellow lemon
banana = banana
watermelon = watermelon
grapes = grapes | purple grapes
strawberry = strawberry | red strawberry
cherries = cherries
peach = peach
pineapple = pineapple
coconut = coconut
kiwifruit = kiwi
tomato = tomato | red tomato
avocado = avocado
eggplant = eggplant | purple eggplant
broccoli = broccoli
carrot = carrot | orange carrot
corn = corn
hot_pepper = hot pepper | red pepper
cucumber = cucumber
potato = potato
bread = bread
croissant = croissant
pretzel = pretzel
cheese_wedge = cheese
pancakes = pancakes
hamburger = hamburger | burger
fries = french fries | fries
pizza = slice of pizza | pizza
hotdog = hot dog
taco = taco
sandwich = sandwich
fried_egg = fried egg | egg
popcorn = popcorn
sushi = sushi
ramen = bowl of noodles | noodles
icecream = soft ice cream
ice_cream = ice cream
doughnut = doughnut | donut
cookie = cookie
birthday = birthday cake
cake = slice of cake | cake
cupcake = cupcake
chocolate_bar = chocolate bar | chocolate
candy = candy
lollipop = lollipop
coffee = cup of coffee | coffee
tea = cup of tea | tea
wine_glass = glass of wine | wine
beer = mug of beer | beer
glass_of_milk = glass of milk | milk
sunny = sun
sun_with_face = sun with face
full_moon = full moon | moon
crescent_moon = crescent moon
star = yellow star | star
star2 = glowing star
cloud = cloud
partly_sunny = sun behind cloud
rain_cloud = cloud with rain | rain
lightning = cloud with lightning
rainbow = rainbow
umbrella_with_rain_drops = umbrella with rain drops
umbrella = umbrella | purple umbrella
snowflake = snowflake
fire = fire
droplet = droplet | water drop
ocean = water wave | wave
zap = lightning bolt | lightning
earth_africa = earth globe | earth
ringed_planet = planet with ring | planet
volcano = volcano
mount_fuji = mountain
car = red car | car
taxi = taxi | yellow taxi
blue_car = blue car
bus = bus
police_car = police car
ambulance = ambulance
fire_engine = fire engine
racing_car = racing car
truck = truck
tractor = tractor
bike = bicycle
train2 = train
rocket = rocket
airplane = airplane
helicopter = helicopter
flying_saucer = flying saucer | ufo
boat = sailboat
ship = ship
anchor = anchor
traffic_light = traffic light
octagonal_sign = stop sign
soccer = soccer ball
basketball = basketball
football = american football
baseball = baseball
tennis = tennis ball
volleyball = volleyball
8ball = billiard ball
bowling = bowling ball
dart = dart target | target
trophy = trophy
crown = crown | golden crown
gem = diamond | gem
ring = ring
gift = gift
balloon = balloon | red balloon
tophat = top hat
guitar = guitar
violin = violin
trumpet = trumpet
key = key
lock = lock
bell = bell | yellow bell
bulb = light bulb
camera = camera
alarm_clock = alarm clock | clock
hourglass = hourglass
phone = red telephone | telephone
tv = television
computer = computer
books = books
scissors = scissors
pencil2 = pencil
hammer = hammer
bomb = bomb
magnet = magnet
house = house
european_castle = castle
tent = tent
game_die = dice
video_game = video game
teddy_bear = teddy bear
art = artist palette
eyes = eyes
lips = mouth | lips
brain = brain
+1 = thumbs up
warning = warning sign
no_entry = no entry sign
"""

#: Prompts whose words all occur in training but whose combination does not (no picture of it either).
HELDOUT_PROMPTS: tuple[str, ...] = (
    "green heart",
    "blue circle",
    "purple square",
    "orange book",
    "pink circle",
    "pink square",
    "red diamond",
    "green diamond",
    "blue triangle",
    "yellow triangle",
    "blue apple",
    "yellow car",
    "green car",
    "purple book",
    "blue star",
    "green balloon",
)

#: Training prompts shown in the sample grid.
SHOWCASE_PROMPTS: tuple[str, ...] = (
    "red heart",
    "blue heart",
    "green square",
    "smiling face",
    "face with sunglasses",
    "dog face",
    "cat face",
    "panda face",
    "frog face",
    "slice of pizza",
    "red apple",
    "strawberry",
    "doughnut",
    "sunflower",
    "red car",
    "soccer ball",
)


def emoji_prompts() -> dict[str, list[str]]:
    """Short name of every training emoji -> its prompts, the main one first."""
    table: dict[str, list[str]] = {}
    for line in _TABLE.strip().splitlines():
        name, prompts = line.split(" = ")
        if name in table:
            raise ValueError(f"emoji {name!r} is listed twice")
        table[name] = [prompt.strip() for prompt in prompts.split("|")]
    return table


def training_prompts() -> list[str]:
    """Every prompt seen in training (without the empty one), in table order."""
    return [prompt for prompts in emoji_prompts().values() for prompt in prompts]


def vocabulary() -> list[str]:
    """Every word of the training prompts, sorted."""
    return sorted({word for prompt in training_prompts() for word in prompt.split()})
