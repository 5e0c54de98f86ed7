"""What the ledger page says in words."""

LEAD = ("Models that both see and draw, one short file each over shared parts: trained by their own recipes on equally "
        "many documents of a small world whose truth is exact, measured on the same items, and drawing the same "
        "prompts. Whatever came out is here, right or wrong.")
LEVEL_WORDS = {"E1": "trains and generates", "E2": "claim measured", "E3": "equals published code",
               "E4": "published weights or score"}
FOOT = ("Made by <code>diptych ledger page</code> from the entries of the ledger, which hold the resolved recipes, "
        "seeds, machines and every figure. One file, nothing is fetched.")

WORDS = {
    "prompts": "What is asked, with the picture that the world itself would draw. The first documents of the test "
               "split with one, two and three objects; nobody has chosen them. A drawing is right if number, shape, "
               "colour, place and relation are, with nothing else in it.",
    "colors": "how far the colours shown are those asked for, on the test split: what a drawing has right before its "
              "shapes can be perceived; 97% for true pictures",
    "systems": "Shares that are right, with 95% intervals: above on the test split, below on pairs of colour and shape "
               "that no training document shows. Every heading sorts; the address keeps order and filters, to be "
               "shared.",
    "caption": "All systems: evidence, scores on the test split and on held-out pairs, parameters, cost of a picture "
               "and of an answer, cost of the training, and drawings of the shared prompts.",
    "cost": "GFLOP per picture against drawings that are right on the test split; the band is the 95% interval. Up "
            "and to the left is better. The hollow dot is the reference, which has seen far more.",
    "claims": "What papers claim, measured against a control at equal budget, over several seeds, with a rule that was "
              "fixed before. The effect is signed in favour of the claim; reproduced means that its whole interval "
              "lies above the margin asked for, not reproduced that it lies below.",
    "no claims": "None measured yet.",
}

MEANING = (
    "Equal is the number of training documents, {documents} per system, and the items asked, {items} per task and "
    "split. Batches, rates, tasks and all else are each recipe's own, with its stages in proportion.",
    "FLOP and seconds are not equal: systems differ in what a document costs. Both are in the table, and sorting by "
    "them is often more telling than sorting by score.",
    "Starting points are not equal either. Where a paper takes a pretrained tokenizer, tower or language model from "
    "the hub, the system starts from the zoo's small one, named in its row. What that took to train is not counted. A "
    "score in italics is of a task that the recipe does not train: it came with those weights.",
    "Models of about ten million parameters, 64-pixel pictures, minutes of computing, one seed. This says how well a "
    "mechanism learns early and at small scale; it does not rank the papers, whose models are a thousand times larger "
    "and saw other data.",
    "Recipes were not tuned for this budget. A system that is behind here may need longer, larger, or a better recipe.",
    "Intervals are of the items asked (Wilson's). What another seed of the training would change is not in them: small "
    "differences mean nothing.",
    "GFLOP are those of linear layers and convolutions over a whole picture or answer with guidance and all steps, "
    "batched as measured; attention products are left out. Parameters \"to draw\" and \"to answer\" are those that "
    "take part.",
    "Verdicts on drawings come from a program that recovers the scene from the pixels and may abstain, which counts as "
    "wrong.",
)
