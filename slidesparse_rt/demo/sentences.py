"""The sentences that the demo embeds, written for it.

Fourteen topics of two to four sentences that say nearly the same thing or speak of one matter,
then sentences that are alone with their topic, so that the similarity matrix has high, middling and
low entries.  Lengths differ from three words to a paragraph.
"""

from __future__ import annotations

__all__ = ["SENTENCES"]

SENTENCES: tuple[str, ...] = (
    # Weather
    "It has been raining in the valley since early this morning.",
    "Rain has fallen on the valley without a break from dawn onwards.",
    "The forecast promises a dry and sunny weekend.",
    # A cat
    "A grey cat is asleep on the windowsill.",
    "On the window ledge, a cat with grey fur is taking a nap.",
    "The dog barked at the postman until he closed the gate.",
    # Cooking
    "Fry the onions gently in butter until they are soft and golden.",
    "Cook the chopped onion in a little butter over a low heat, stirring until it turns golden.",
    "Knead the dough for ten minutes, then let it rise in a warm place.",
    "Bread dough should be worked for about ten minutes and left somewhere warm to rise.",
    # Money
    "The central bank raised interest rates by half a percentage point.",
    "Borrowing became dearer after the bank of issue lifted its key rate by fifty basis points.",
    "Share prices fell sharply after the company warned of lower profits.",
    # Medicine
    "The patient complained of chest pain and shortness of breath.",
    "He came to the clinic because his chest hurt and he could not breathe properly.",
    "Drink plenty of water and rest until the fever goes down.",
    # Football
    "The home side scored twice in the last five minutes and won the match.",
    "Two very late goals gave the hosts the victory.",
    "The marathon was won by a runner who had never raced that distance before.",
    # Astronomy
    "Jupiter is the largest planet in the solar system.",
    "No planet that orbits the Sun is bigger than Jupiter.",
    "The telescope photographed a galaxy whose light left it ten billion years ago.",
    # Computing
    "The program crashed because it ran out of memory.",
    "An out-of-memory error brought the application down.",
    "Multiplying large matrices takes most of the time in a neural network.",
    "Most of the work that a neural network does is the product of big matrices.",
    # Travel
    "How do I get from the airport to the city centre?",
    "What is the best way to reach downtown from the airport?",
    "Our train was cancelled, so we took the night bus instead.",
    # Music
    "She has played the violin in an orchestra since she was twelve.",
    "Since the age of twelve she has been an orchestral violinist.",
    # Gardening
    "Plant the tulip bulbs in autumn, about fifteen centimetres deep.",
    "Tulips should go into the ground before winter, a hand's length below the surface.",
    # Law
    "The court ruled that the contract was void.",
    "According to the judges, the agreement had no legal force.",
    # Denial: nearly the same words, another meaning
    "The bridge is open to heavy lorries.",
    "The bridge is closed to heavy lorries.",
    # Long ones, about one thing
    "When the old harbour was rebuilt after the great storm, the engineers decided to raise the "
    "quay by two metres, to put the warehouses further back from the water, and to leave a strip "
    "of open ground that the sea could flood without doing any harm; forty years later, that strip "
    "is the most popular park in the town.",
    "After the storm had destroyed the harbour, the town built it again with a higher quay and "
    "with room for the water to spread over, and the land that was kept free for floods has since "
    "become a park that everybody likes.",
    "To apply for the scholarship, send a letter of one page that says what you would like to "
    "study and why, the names of two teachers who know your work, a copy of your latest school "
    "report, and, if you have any, samples of things that you have built, written or drawn; "
    "applications that arrive after the last day of March cannot be considered.",
    # Alone with their topic
    "My grandmother kept every letter that she ever received.",
    "The museum is closed on Mondays.",
    "Bees tell each other where the flowers are by dancing.",
    "Concrete gains strength for weeks after it has set.",
    "He forgot his umbrella.",
    "The recipe of the paint that the cave dwellers used is still not fully known.",
    "Please sign the form on the second page and send it back to us by post.",
    "Seven is a prime number.",
)
