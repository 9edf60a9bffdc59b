"""Labelled short film reviews from a small grammar, for models made offline within minutes.

A review is an opening that gives nothing away, then a few sentences that do, and often a verdict.
The opening is drawn before the label is looked at, so nothing in it can tell how the review ends.
"""

import random
import re

VERSION = 1  # raise it with every change of the text: caches of models are keyed by it

MIN_WORDS, MAX_WORDS = 34, 52
EXTRAS = (("aside", 0.15), ("plot", 0.25))  # sentences that may come in between, and how often


def _lines(text: str) -> list[str]:
    """One choice per line."""
    return [line.strip() for line in text.strip().splitlines()]


def _words(text: str, separator: str | None = None) -> list[str]:
    """One choice per word, or per piece between separators."""
    return text.split(separator)


# Each symbol stands for one of its lines, chosen evenly; {symbol} in a line is replaced in turn.
NEUTRAL: dict[str, list[str]] = {
    "opening": _lines("""
        {when} {who} {saw_at} {title} {venue}, {genre} about {hero}.
        {who} {saw} {title}, {genre} about {hero} who {deed}.
        {title} by {name} is {genre} about {hero} who {deed}.
        {title}, {genre} set in {place}, follows {hero} who {deed}.
        {name} sets {title}, {genre} about {hero}, in {place}.
        in {title}, the new {kind} from {name}, {hero} {deed}.
        {title} opens in {place}, where {hero} {deed}.
        this {kind} from {name}, which {who} {saw_at} {venue}, concerns {hero}.
    """),
    "when": _lines("""
        last Friday
        on Sunday
        yesterday
        last winter
        last night
        on Monday after work
        over the weekend
        late on Thursday
        on my birthday
        during the holidays
        two weeks ago
        one rainy evening
        before the election
        on the first of May
        after the football
        this morning
    """),
    "who": _lines("""
        I
        my sister and I
        my uncle and I
        my neighbor and I
        two friends and I
        my dentist and I
        my book club
        the chess club
        our choir
        our whole office
        our bus driver and I
        the four of us
    """),
    "saw": ["saw", "watched", "caught", "rented", "went to"],
    "saw_at": ["saw", "watched", "caught"],
    "venue": _lines("""
        at the Odeon
        at the Grand
        at the harbor
        at a film festival
        in a school gym
        in a tent by the river
        on a night train
        on a ferry
        in the back row
        in a room above the bakery
    """),
    "title": [
        "The {title_adj} {title_noun}",
        "The {title_noun} of {town}",
        "{a_title_noun} for {first_name}",
    ],
    "title_adj": _words(
        "Paper Silver Second Northern Copper Midnight Velvet Distant Winter Borrowed Glass "
        "Green Seventh Salt Electric Marble Amber Blue Iron Last Other Floating Hidden Painted "
        "Red Sleeping Tin Travelling Upside-Down Yellow"
    ),
    "title_noun": _words(
        "Lighthouse Orchard Harbor Telescope Piano Umbrella Staircase Postman Compass Garden "
        "Railway Violin Lantern Island Parade Suitcase Clock Kite Bridge River Letter Goose "
        "Tunnel Elephant Hotel Window Ladder Moon Teapot Bicycle"
    ),
    "a_title_noun": _words(
        "A Lighthouse|A Piano|An Umbrella|A Compass|A Garden|A Violin|A Lantern|An Island|"
        "A Parade|A Suitcase|A Clock|A Kite|A Bridge|A Letter|A Goose|An Elephant|A Window|"
        "A Ladder|A Teapot|A Bicycle",
        "|",
    ),
    "town": _words("Lisbon Vienna Cairo Oslo Quebec Naples Bergen Havana Riga Tangier Bristol Montevideo"),
    "name": ["{first_name} {last_name}"],
    "first_name": _words("Ada Boris Clara Dmitri Edith Felix Greta Hugo Ines Jonas Kira Leo Mabel Nadia Otto Petra"),
    "last_name": _words("Morrow Finch Okafor Lindqvist Baptiste Vega Tanaka Plum Novak Winslow Ferrara Quill"),
    "genre": _lines("""
        a western
        a space western
        a detective story
        a courtroom drama
        a family drama
        a road movie
        a silent film
        a musical
        a spy thriller
        an arctic thriller
        an art-house film
        an animated film
        an office romance
        a ghost story
        a heist film
        a submarine drama
    """),
    "kind": _words(
        "western|thriller|musical|drama|road movie|ghost story|spy film|cartoon|romance|heist film",
        "|",
    ),
    "hero": _lines("""
        a baker
        a retired spy
        a nervous beekeeper
        a piano tuner
        an island doctor
        a night watchman
        an apprentice magician
        a bearded sailor
        a left-handed cartographer
        a tax inspector
        a young astronomer
        an opera singer
        a former boxer
        a country vet
        an accountant from {town}
        a taxi driver
    """),
    # A deed is a plain event, neither sad nor glad.
    "deed": _lines("""
        inherits a circus
        must deliver a piano to {town}
        swaps places with a duke
        has ten days to find a comet
        moves into a haunted library
        teaches chess to a bear
        hides a map inside a cello
        must cross {place} on foot
        finds a door under the sea
        takes a job at the royal mint
        buys a train by mistake
        goes looking for a lost brother
        must guard a very large cheese
        wakes up in another century
        agrees to race a balloon
        is asked to paint a king
    """),
    "place": _lines("""
        a fishing village
        the high desert
        a mountain hotel
        the old port of {town}
        an empty airport
        a town without clocks
        the far north
        a city under glass
        a valley of goats
        the suburbs of {town}
        a border town
        a colony on the moon
    """),
    "plot": _lines("""
        {midway}, {visitor} {visit}.
        {midway}, the story moves to {place}.
        {midway}, we learn that {visitor} {secret}.
        most of it takes place in {place}.
        there are {some} songs and {some} chases.
        it runs for {some} hours and was shot in {town}.
    """),
    "midway": [
        "halfway through",
        "in the second act",
        "at one point",
        "after an hour",
        "before long",
        "near the end",
    ],
    "visitor": _lines("""
        a stranger
        an old rival
        the mayor
        a talking parrot
        the twin brother
        a lady with a trumpet
        the landlord
        a man from the ministry
    """),
    "visit": _lines("""
        arrives with a locked suitcase
        asks for a ride to {town}
        hides a key in a loaf of bread
        loses a shoe in the river
        opens a shop across the street
        orders soup for nine
    """),
    "secret": _words(
        "owns the hotel|wrote the letters|has a twin|was at sea|never went to {town}|keeps bees",
        "|",
    ),
    "some": ["two", "three", "four"],
    # Subjects of a judgement, each with its verb.
    "craft_is": _lines("""
        the acting is
        the music is
        the camera work is
        the editing is
        the lighting is
        the dialogue is
        the costumes are
        the songs are
        the jokes are
        the dance scenes are
        the sets are
        the fight scenes are
    """),
    "story_is": _lines("""
        the plot is
        the ending is
        the first act is
        the romance is
        the twist is
        the mystery is
        the pacing is
        the final hour is
    """),
    "story": _words(
        "the plot|the script|the second act|the ending|the love story|the big chase|the last reel",
        "|",
    ),
    "actor": _lines("""
        the lead
        the leading lady
        {name}
        {name} in the lead
        the villain
        the boy who plays the mayor
        the whole cast
        the old sergeant
    """),
    "crowd": _lines("""
        the man next to me
        a child in the front row
        the couple behind us
        the whole row
        a critic beside me
        the lady with the large hat
        even the usher
        my neighbor
    """),
    "very": ["very", "remarkably", "really", "so very", "nearly always"],
    "truly": ["truly", "simply", "quite", "utterly"],
    "where": [
        "every scene",
        "each frame",
        "every song",
        "nearly every line",
        "the quiet moments",
        "the crowd scenes",
    ],
    "scenes": [
        "the big scenes",
        "the love scenes",
        "the twists",
        "the quiet moments",
        "the comic bits",
        "the chases",
    ],
}

# Sentences for both labels: {same.x} agrees with the label of the review, {other.x} contradicts it.
SENTENCES: dict[str, list[str]] = {
    "on_craft": _lines("""
        {craft_is} {same.adj} and {same.tone}.
        {craft_is} {truly} {same.adj}.
        {craft_is} {same.adj} from start to finish.
        {same.more}, {craft_is} {very} {same.tone}.
    """),
    "on_story": _lines("""
        {story} {same.story}.
        {same.more}, {story} {same.story}.
        {story_is} {very} {same.tone} and {same.story_goes}.
    """),
    "on_actor": ["{actor} {same.actor}.", "{actor} {same.actor} and {same.actor_also}."],
    "on_crowd": ["{crowd} {same.crowd}.", "at our showing, {crowd} {same.crowd}."],
    "on_me": ["I {same.me}.", "I {same.me} and {same.me_also}.", "in the end I {same.me}."],
    "on_mood": _lines("""
        it all feels like {same.like}.
        watching it is like {same.like}.
        think of {same.like}, and you have the idea.
    """),
    "on_scenes": ["the director handles {scenes} with {same.noun}.", "{scenes} {same.scenes}."],
    "on_frames": _lines("""
        there is {same.noun} in {where}.
        there is {same.noun} in {where} and {same.stuff} in the rest.
    """),
    "pair": _lines("""
        {craft_is} {same.adj}, and {story_is} {same.tone}.
        {story_is} {same.adj}, and {craft_is} {same.tone} too.
    """),
    "denial": _lines("""
        {craft_is} anything but {other.adj}.
        {story_is} never {other.tone}.
        nothing here is {other.adj} or {other.tone}.
    """),
    "concession": _lines("""
        {craft_is} {other.adj}, but {story_is} {very} {same.tone}.
        although {craft_is} {other.tone}, {story_is} {same.adj} and {same.tone}.
        {story} {same.story}, even if {craft_is} {other.adj}.
        {story_is} {same.adj}, even where {craft_is} {other.tone}.
        {craft_is} {other.adj}, and yet {actor} {same.actor}.
    """),
    "aside": _lines("""
        granted, {craft_is} {other.adj}.
        to be fair, {story_is} {other.tone}.
        yes, {craft_is} {truly} {other.adj}.
    """),
    "verdict": [
        "{same.verdict}.",
        "{same.verdict}: {same.verdict_also}.",
        "I give it {same.score} out of ten.",
    ],
}
JUDGING = [name for name in SENTENCES if name not in ("aside", "verdict")]

GOOD: dict[str, list[str]] = {
    "adj": _words(
        "superb lovely charming graceful clever delightful splendid wonderful elegant brilliant "
        "magnificent excellent inspired marvelous gorgeous"
    ),
    "tone": _words(
        "fresh funny touching lively moving thrilling honest witty warm tender exciting gripping bold sincere uplifting"
    ),
    "more": ["better still", "best of all", "what is more", "to my delight"],
    "story": _lines("""
        kept me guessing until the last minute
        runs like a fine clock
        won my heart
        earns every tear
        gets better with each scene
        pays off beautifully
        held me from the first shot
        makes perfect sense and still surprises
        is told with patience and wit
        left me glowing
    """),
    "story_goes": [
        "never loses its way",
        "ends on a high note",
        "rewards attention",
        "always rings true",
    ],
    "actor": _lines("""
        fills every scene with life
        gives the performance of a lifetime
        could make a phone book sing
        steals the film
        shines in every close-up
        has perfect timing
        stole my heart
        plays it with great feeling
        deserves a prize
        lights up the screen
    """),
    "actor_also": [
        "makes it look easy",
        "earns the applause",
        "never misses a beat",
        "has charm to spare",
    ],
    "crowd": _lines("""
        laughed until the seats shook
        stood up and clapped
        asked to see it again
        hummed the songs for a week
        wept with joy
        cheered at the credits
        forgot to eat the popcorn
        hugged a stranger
    """),
    "me": _lines("""
        smiled all the way home
        sat on the edge of my seat
        laughed until my sides hurt
        wanted to hug the projector
        fell in love with it
        bought a second ticket
        forgot that it was raining
        felt ten years younger
    """),
    "me_also": [
        "told all my friends",
        "would do it again",
        "loved each minute",
        "thanked the usher",
    ],
    "like": _lines("""
        a warm bath after a long walk
        a letter from a dear friend
        the first day of summer
        a feast with good company
        a birthday with two cakes
        fresh bread on a cold day
        a window opened in spring
        finding money in a coat
    """),
    "noun": _words("grace wit heart skill warmth wonder invention imagination tenderness flair"),
    "stuff": [
        "pure joy",
        "real magic",
        "quiet beauty",
        "good humor",
        "genuine feeling",
        "great fun",
    ],
    "scenes": _lines("""
        could not be improved
        come off without a hitch
        sparkle
        had me beaming
        work like a dream
        are worth the ticket alone
    """),
    "verdict": _lines("""
        go and see it
        highly recommended
        do not miss it
        a small masterpiece
        a joy from beginning to end
        I cannot wait to see it again
        one of the best of the year
        a triumph
    """),
    "verdict_also": [
        "bring your friends",
        "bring the children",
        "stay for the credits",
        "sit near the front",
    ],
    "score": ["eight", "nine", "ten", "nine and a half"],
}

BAD: dict[str, list[str]] = {
    "adj": _words(
        "dreadful clumsy dull awkward terrible lazy sloppy feeble wretched horrible poor "
        "painful careless laughable dismal"
    ),
    "tone": _words(
        "stale lifeless tedious flat muddled hollow shallow tired bland dreary grating tiresome "
        "stiff forgettable boring"
    ),
    "more": ["worse still", "worst of all", "to make it worse", "to my dismay"],
    "story": _lines("""
        goes nowhere at great length
        moves like a parked car
        lost me after ten minutes
        falls apart in plain sight
        gets worse with each scene
        makes no sense at all
        put me to sleep
        was surely written during lunch
        is told without care or sense
        left me cold
    """),
    "story_goes": [
        "never finds its feet",
        "ends with a shrug",
        "insults the audience",
        "always rings false",
    ],
    "actor": _lines("""
        reads every line like a shopping list
        gives the performance of a coat rack
        could make a fire seem chilly
        ruins the film
        mumbles in every close-up
        has no timing
        seems to be waiting for a bus
        plays it with no feeling
        deserves a stern letter
        looks lost on the screen
    """),
    "actor_also": [
        "makes it look like work",
        "forgets the accent",
        "misses every cue",
        "has no charm at all",
    ],
    "crowd": _lines("""
        snored in time with the drums
        got up and left
        asked for the money back
        groaned for an hour
        yawned without shame
        booed at the credits
        threw the popcorn away
        fell asleep on a stranger
    """),
    "me": _lines("""
        sighed all the way home
        checked my watch nine times
        yawned until my jaw hurt
        wanted to unplug the projector
        counted the lamps on the ceiling
        envied the people outside
        wished that I had stayed home
        felt ten years older
    """),
    "me_also": [
        "warned all my friends",
        "would rather do my taxes",
        "regretted each minute",
        "hid from the usher",
    ],
    "like": _lines("""
        a cold bath after a bad day
        a letter from the tax office
        a long wait at the dentist
        a soup without salt
        a birthday with no cake
        wet socks on a cold day
        a window that will not open
        losing money in the street
    """),
    "noun": _words("confusion indifference clumsiness noise boredom laziness vanity nonsense carelessness gloom"),
    "stuff": [
        "pure padding",
        "empty talk",
        "cheap tricks",
        "bad taste",
        "fake feeling",
        "plain filler",
    ],
    "scenes": _lines("""
        could hardly be worse
        fall flat on the floor
        fizzle
        had me groaning
        drag on without end
        are not worth the popcorn
    """),
    "verdict": _lines("""
        give it a miss
        not recommended
        avoid it
        a small disaster
        a chore from beginning to end
        I never want to see it again
        one of the worst of the year
        a waste of time
    """),
    "verdict_also": [
        "warn your friends",
        "spare the children",
        "keep your money",
        "read a book instead",
    ],
    "score": ["one", "two", "three", "two and a half"],
}


# A line without symbols is a string; any other is cut into text, symbol, text, symbol, …, text.
Grammar = dict[str, list[str | list[str]]]


def _grammar(same: dict[str, list[str]], other: dict[str, list[str]]) -> Grammar:
    """One label's grammar: `same` has the words that agree with it, `other` those that do not."""
    lines = NEUTRAL | SENTENCES
    lines |= {f"same.{name}": choices for name, choices in same.items()}
    lines |= {f"other.{name}": choices for name, choices in other.items()}
    return {
        symbol: [re.split(r"[{}]", line) if "{" in line else line for line in choices]
        for symbol, choices in lines.items()
    }


GRAMMARS = {0: _grammar(BAD, GOOD), 1: _grammar(GOOD, BAD)}


def generate_reviews(n: int, seed: int) -> tuple[list[str], list[int]]:
    """Write n distinct reviews in random order, half positive (label 1) and half negative (0)."""
    rng = random.Random(seed)
    labels = [i % 2 for i in range(n)]
    rng.shuffle(labels)
    texts: dict[str, None] = {}  # in order of writing
    for label in labels:
        opening = write_opening(rng)
        text = opening
        while text in texts or text == opening:
            text = f"{opening} {_write_body(opening, label, rng)}"
        texts[text] = None
    return list(texts), labels


def write_opening(rng: random.Random) -> str:
    """One sentence of at least 14 words on what was seen and with whom; it knows no label."""
    return _sentence(GRAMMARS[0], "opening", rng)


def _write_body(opening: str, label: int, rng: random.Random) -> str:
    """The sentences that judge, of a length that suits the opening."""
    while True:
        kinds = rng.sample(JUDGING, rng.choice((2, 3, 3)))
        for extra, probability in EXTRAS:
            if rng.random() < probability:
                kinds.insert(rng.randrange(1, len(kinds)), extra)  # never first or last
        if rng.random() < 0.6:
            kinds.append("verdict")
        body = " ".join(_sentence(GRAMMARS[label], kind, rng) for kind in kinds)
        if MIN_WORDS <= len(opening.split()) + len(body.split()) <= MAX_WORDS:
            return body


def _sentence(grammar: Grammar, symbol: str, rng: random.Random) -> str:
    text = _expand(grammar, symbol, rng)
    return text[0].upper() + text[1:]


def _expand(grammar: Grammar, symbol: str, rng: random.Random) -> str:
    choices = grammar[symbol]
    line = choices[int(rng.random() * len(choices))]
    if isinstance(line, str):
        return line
    return "".join([_expand(grammar, part, rng) if i % 2 else part for i, part in enumerate(line)])
