"""The paper's figures (arXiv 2406.10459, Tables 1-6), measured on private data. The report shows them in grey, for
orientation only."""

PAPER = {
    "diagnosis": [("CancerLLM-7B", 86.81), ("Bio-Mistral-7B", 68.89)],
    "phenotype": [("CancerLLM-7B", 91.78), ("ClinicalCamel-70B", 93.72)],
    "wrong_labels": "diagnosis F1 falls as the rate of counterfactual training labels rises (Table 3)",
    "misspelling": "diagnosis F1 about 12 on misspelled test notes (Tables 3 and 4)",
    "efficiency": [
        ("CancerLLM-7B, phenotypes, one A100", "1:14:12", 5550),
        ("ClinicalCamel-70B, the same", "2:50:16", 37716),
    ],
    "retrieval": [("Specter2", 89.12), ("without retrieval", 86.81)],
}
