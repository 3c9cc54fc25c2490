# ruff: noqa: E501  (tables of wordings: one a line)
"""The four note styles of the unseen test set: no template, wording list or abbreviation list is shared with training.

Single forms are: left, right, ER, PR, and names that have no other (train/data/README.md lists them). Sizes, sides,
grades, stages and receptors are written otherwise too; all of it is plain to a reader of clinical English.
"""

from __future__ import annotations

from train.clinic.terms import Style

WORLD: dict[str, tuple[str, ...]] = {
    "family": (
        "the mother's {her_rival}", "an aunt lost to {her_rival}", "two uncles, one with {his_rival}", "a grandmother known for {her_rival}", "the twin brother's {his_rival}", "a daughter already through {her_rival}",
    ),
    "benign": (
        "fatty lump under the skin", "fluid-filled renal cyst", "hepatic haemangioma", "nodule in the thyroid known to be harmless", "lung scar", "ovarian dermoid", "breast cyst", "bone island of the hip",
    ),
    "other_hist": ("carcinoid", "oat cell tumor", "melanoma deposits", "germ cell tumor", "mesothelioma", "plasmacytoma", "granuloma mimicking cancer"),
}  # fmt: skip

_WORDS: dict[str, tuple[str, ...]] = {
    "size": ("{a}cm", "{am}-mm", "{am} mm by {bm} mm", "{a} × {b} × {c} cm", "{a} cm × {b} cm"),
    "left": ("left",), "right": ("right",), "bilateral": ("on both sides",),
    "join": ("{hist} situated in {where}", "{hist} (from {where})", "{where} harbouring {hist}", "{hist} sitting within {where}"),
    "stage": ("UICC {x}", "anatomic stage {x}", "an overall stage of {x}"),
    "ER": ("oestrogen receptors", "ER protein"), "PR": ("progesterone receptors", "PR protein"), "HER2": ("c-erbB-2 (HER2)", "HER2 protein"),
    "positive": ("{r} present in {pct} of 100 cells", "{r} richly expressed", "{r} scored Allred 8 of 8"),
    "negative": ("{r} absent", "{r} scored Allred 0 of 8", "no {r} seen"),
    "HER2_positive": ("{r} overexpressed", "gene-amplified {r}"),
    "HER2_negative": ("{r} not overexpressed", "no overexpression of {r}"),
    "HER2_equivocal": ("{r} borderline with in-situ hybridisation outstanding", "{r} borderline at score two"),
    "triple": ("lacking all three of ER PR and HER2",), "awaited": ("{r} still being processed",), "listing": (" plus ", " with ", " / "),
}  # fmt: skip

_SHORT_WORDS = _WORDS | {
    "size": ("{a}cm", "{am}-mm", "{a}×{b}cm"),
    "left": ("(L)", "lft"), "right": ("(R)", "rght"), "bilateral": ("both sides",),
    "join": ("{hist} @ {where}", "{where} = {hist}", "{hist} [{where}]".replace("[", "(").replace("]", ")")),
    "stage": ("UICC {x}", "AJCC-{x}"),
    "ER": ("oestr. rec.", "ER"), "PR": ("prog. rec.", "PR"), "HER2": ("erbB2/HER2", "HER-2"),
    "positive": ("{r} expr.", "{r} yes"), "negative": ("{r} no", "{r} non-expr."),
    "HER2_positive": ("{r} overexpr.", "{r} ISH amplified"), "HER2_negative": ("{r} no", "{r} non-amplified"), "HER2_equivocal": ("{r} borderline",),
    "triple": ("ER/PR/HER2 all absent",), "awaited": ("{r} outstanding",), "listing": (" & ", " // ", " · "),
}  # fmt: skip

_LETTER: dict[str, tuple[str, ...]] = {
    "open": (
        "Many thanks for sending along this {person} of {age} years whose story starts with {complaint}.", "I met your patient, now {age}, after {complaint} had worried {him} for {n} weeks.",
        "Your patient, a {person} aged {age} by now, sat with us this afternoon because of {complaint}.",
    ),
    "dx": (
        "The laboratory tells us it is {dx}.", "What the microscope shows is {dx}, and I quote, {grade}.", "Put plainly: {dx}.", "At first {other_hist} was on the list but the tissue turned out as {dx}.",
        "After {op} the verdict reads {dx}.",
    ),
    "size": (
        "Laid on the bench the growth came to {size}.", "Its widest span is {size}.", "Scans had foretold {size_old} whereas the pathologist counted {size}.", "There were a pair of growths, the lesser {size_less} and the greater {size}.",
        "It has gone from {size_old} in winter to {size} at the latest look.",
    ),
    "d_size": (
        "Clear tissue around it amounts to {mm} mm.", "By chance a {benign} some {size_any} across came to light which we shall leave alone.", "{need_clean}The biggest gland under suspicion was a mere {mm} mm and innocent.", "The wound, {size_any} long, has closed.",
    ),
    "grade": ("Under the lens it counts as {grade}.", "As to its grading: {grade}."),
    "d_grade": ("Numb fingers from earlier drugs rate 2 on the toxicity scale.", "Heart relaxation is impaired to the first degree, grade 1.", "Sickness on tablets reached grade 3 for two days."),
    "stage": ("Taking all scans together we arrive at {stage}.", "For the registry: {stage}."),
    "d_stage": ("Kidney function is that of CKD stage 3.", "We had feared {stage_old} until the operation told us otherwise."),
    "rec": ("Hormone and growth factor tests read {rec}.", "From the marker laboratory: {rec}."),
    "no_size": ("Nobody wrote down how large it was.",), "no_grade": ("How aggressive it looks was left out of the report.",), "no_stage": ("How far it has travelled we cannot say before the scans.",),
    "no_rec": ("{need_breast}The marker laboratory has yet to answer.",),
    "d_side": ("The {any_side} hip was replaced long ago and serves well.", "{need_paired}I could find nothing amiss on the {other_side} side.", "A drip site over the {any_side} wrist is bruised."),
    "family": ("In the family I heard about {family}.", "Relatives matter here: {family}."),
    "prior": ("Years before there had been {rival}.", "An older chapter, closed in {year}, was {rival}.", "Do not confuse this with {rival}, overcome in {year}."),
    "d_site": ("Samples from the {other_site} came back harmless.", "Elsewhere someone had written {other_type}, mistakenly.", "{need_paired}A clerk typed {other_side} on the form; please strike it out."),
    "d_rec": ("{need_breast}The needle sample had read {rec_old} but the whole growth was tested afresh.",),
    "neg": ("{need_local}Nothing points to spread.", "We saw no trace of {other_hist}.", "{need_clean}Glands, bones and brain all look clean."),
    "ros": ("Eating and sleeping as ever, no sweats, no breathlessness.", "There is some tiredness toward evening but neither pain nor sickness.", "No cough, no loss of weight, bowels as always."),
    "exam": ("I found a comfortable person, {kg} kg, pressure 1{n}4 over 7{n}.", "Chest and belly were unremarkable when I examined {him}."),
    "plan": ("We agreed on {n} rounds of drug treatment and a fresh scan thereafter.", "I shall see {him} again in the clinic in {n} months' time.", "The team will talk it through on Thursday and I will write again."),
}  # fmt: skip

_PARTS: dict[str, tuple[str, ...]] = {
    "open": ("SUBMITTED BECAUSE OF {complaint}; {sex}, {age} Y.", "REQUEST: {complaint}, {person} OF {age}."),
    "gross": ("ONE BAG LABELLED WITH THE NAME; TISSUE {size_spec}.", "TISSUE FROM {op}, ALL TOLD {size_spec}, PAINTED IN TWO COLOURS."),
    "dx": ("{dx}.", "{dx}; {grade}.", "{dx}, SPANNING {size}."),
    "size": ("INVASIVE GROWTH {size}.", "GROWTH SPANS {size}, MEASURED ON THE SLIDES.", "TWIN GROWTHS, {size_less} AND {size}, SEPARATED BY NORMAL TISSUE.", "GROWTH {size} (RADIOLOGIST'S ESTIMATE {size_old})."),
    "d_size": ("FREE EDGE {mm} MM AT LEAST.", "UNRELATED {benign}, {size_any}.", "{need_nodes}NODAL FOCUS {mm} MM WIDE.", "OLD NEEDLE TRACK {size_small}."),
    "grade": ("GRADING: {grade}.", "DEGREE OF MATURATION: {grade}."),
    "d_grade": ("{need_breast}INTRADUCTAL COMPONENT BESIDE IT, NUCLEI OF GRADE III.", "RESPONSE TO DRUGS: REGRESSION SCORE 2.", "SURROUNDING MUCOSA WITH LOW-GRADE DYSPLASIA ONLY."),
    "stage": ("CLASSIFIED AS {stage}.", "EXTENT OF DISEASE: {stage}."),
    "d_stage": ("THE FORM'S CLINICAL ESTIMATE OF {stage_old} NO LONGER HOLDS.",),
    "rec": ("MARKERS: {rec}.", "TESTED ON BLOCK {n}: {rec}."),
    "no_size": ("FRAGMENTS ONLY; EXTENT CANNOT BE GAUGED.",), "no_grade": ("GRADING OMITTED AFTER DRUG TREATMENT.",), "no_stage": ("EXTENT OF DISEASE LEFT OPEN.",), "no_rec": ("{need_breast}MARKERS TO FOLLOW IN AN ADDENDUM.",),
    "neg": ("VESSELS AND NERVES SPARED.", "{other_hist} RULED OUT BY STAINS.", "{need_clean}{nodes} GLANDS, ALL CLEAN.", "{need_paired}SECOND BAG FROM THE {other_side} SIDE: HARMLESS TISSUE."),
    "family": ("FORM MENTIONS {family}.",), "prior": ("ARCHIVE OF {year}: {rival}.", "EARLIER FILES SHOW {rival}."),
    "d_site": ("{other_site} SAMPLED TOO: HARMLESS.", "NEEDLE OPINION OF {other_type} WITHDRAWN.", "{need_paired}FORM SAYS {other_side}, A SLIP OF THE PEN."),
    "d_rec": ("{need_breast}NEEDLE SAMPLE MARKERS {rec_old}, REPLACED BY THOSE OF THIS TISSUE.",),
    "other": ("SLIDES SEEN BY A SECOND READER.", "TISSUE KEPT FOR GENE TESTS."),
}  # fmt: skip

_PHONE: dict[str, tuple[str, ...]] = {
    "open": ("Call rec'd, {sex} {age}, began w. {complaint}.", "Tel. contact: {age}/{S}, orig. {complaint}."),
    "dx": ("Known {dx}.", "Under care for {dx}; {grade}.", "Had {op}, result {dx}."),
    "size": ("Prim. {size}.", "Histol. span {size}; scan said {size_old}.", "Prim. grew {size_old} > {size}.", "Pair of growths {size_less} & {size}."),
    "d_size": ("Chance find {benign} {size_any}, ignore.", "Excision edge {mm}mm.", "Bruise {size_any} post vaccine."),
    "grade": ("Cells {grade}.", "Aggress.: {grade}."),
    "d_grade": ("Toxicity: tingling gd 2, rash gd 1.", "Loose motions gd 3 last wk, settled."),
    "stage": ("Extent {stage}.", "Reg'd {stage}."),
    "d_stage": ("Renal CKD-3.", "First thought {stage_old}, op proved otherwise."),
    "rec": ("Markers {rec}.", "Lab markers: {rec}."),
    "no_size": ("Span unknown.",), "no_grade": ("Aggress. not on file.",), "no_stage": ("Extent unknown till scans.",), "no_rec": ("{need_breast}Markers o/s.",),
    "d_side": ("Pulled muscle {any_side} thigh.", "{need_paired}{other_side} fine.", "Vaccine given {any_side} deltoid."),
    "family": ("Fam.: {family}.",), "prior": ("Earlier ({year}): {rival}.", "Bygone {rival}."),
    "d_site": ("{other_site} sampled, harmless.", "GP letter said {other_type}, mistaken.", "{need_paired}GP letter said {other_side}, slip."),
    "d_rec": ("{need_breast}Needle sample {rec_old}, redone on full specimen.",),
    "neg": ("{need_local}Scans clean elsewhere.", "{other_hist} excluded."),
    "ros": ("Nil fever, nil vomiting.", "Off food a little, sleeping ok.", "Some aches, nil new."),
    "plan": ("Advice: fluids, ring back if worse.", "Booked nurse clinic {n}/52.", "Told to come in tomorrow a.m."),
}  # fmt: skip

_CARE: dict[str, tuple[str, ...]] = {
    "open": ("About you | {age} years, {person}, first noticed {complaint}",),
    "dx": ("What you had | {dx}", "Your illness | {dx}, which was {grade}"),
    "size": ("How big | {size}", "How big | {size} after removal (scan guess {size_old})", "How big | two growths: {size_less} next to {size}"),
    "d_size": ("Seen besides | {benign}, {size_any}, harmless", "Healthy rim | {mm} mm"),
    "grade": ("How it looked | {grade}",), "d_grade": ("After-effects | numb toes, grade 2", "After-effects | dry mouth, grade 1"),
    "stage": ("How far | {stage}",), "d_stage": ("How far, first guess | {stage_old}, since corrected", "Other health | kidneys at CKD stage 3"),
    "rec": ("Markers | {rec}",),
    "no_size": ("How big | nobody noted it",), "no_grade": ("How it looked | not stated",), "no_stage": ("How far | to be worked out",), "no_rec": ("{need_breast}Markers | awaited from the laboratory",),
    "d_side": ("Other health | {any_side} hearing aid", "{need_paired}Opposite side ({other_side}) | nothing found"),
    "family": ("Relatives | {family}",), "prior": ("An earlier cancer | {rival} ({year})", "Long behind you | {rival}"),
    "d_site": ("Also sampled | {other_site}, harmless", "First opinion, dropped | {other_type}"),
    "d_rec": ("{need_breast}Markers of the needle sample, outdated | {rec_old}",),
    "neg": ("{need_local}Spread | none seen", "Excluded | {other_hist}"),
    "treatment": ("What was done | {op} followed by {n} rounds of drugs", "What was done | {op} alone"),
    "ros": ("How you feel | tired toward evening, otherwise well", "How you feel | well, eating and sleeping as before"),
    "plan": ("What comes next | visit every {n} months with blood tests", "What comes next | yearly scan and a call with your nurse"),
}  # fmt: skip

STYLES: tuple[Style, ...] = (
    Style("letter", (
        "Dear colleague,\n<open> <~prior family?> <dx> <~size d_size d_site d_side grade d_grade>\n<~rec d_rec stage d_stage> <ros> <exam> <neg>\n<plan>\nWith kind regards",
        "Dear doctor,\n<open> <dx> <~rec d_rec stage grade d_grade>\n<~prior family? d_side> <~size d_size d_site> <d_stage> <exam> <ros> <plan>\nYours sincerely",
    ), _LETTER, _WORDS, unseen=True),
    Style("parts", (
        "<open> <~prior family?>\n(A) TISSUE FROM {op}:\n<dx>\n<~size d_size d_site grade d_grade neg neg>\n<~stage rec d_rec d_stage>\n<gross>\n<other>",
        "<gross> <d_size?>\nOPINION\n<dx> <~size grade d_grade rec d_rec stage d_stage>\nREMARKS: <~neg d_size neg> <other>\nBACKGROUND: <open> <~prior family?>",
    ), _PARTS, _WORDS, pathology=True, unseen=True, capitals=True),
    Style("phone", (
        "<open> <dx> <~size d_size d_site grade d_grade stage rec d_rec d_side>\n<~prior family? ros> <neg> <d_stage> <plan>",
        "TELEPHONE LOG\n<open> <~prior family? ros>\n<dx> <~rec d_rec stage d_stage grade d_grade size d_size d_site> <d_side?>\n<plan>",
    ), _PHONE, _SHORT_WORDS, terse=True, unseen=True),
    Style("careplan", (
        "YOUR CARE SUMMARY\n<|open dx>\n<~|size d_size d_site grade d_grade stage d_stage rec d_rec prior family? d_side>\n<|treatment neg ros plan>",
        "SUMMARY AFTER TREATMENT\n<|open treatment>\n<~|dx prior family?>\n<~|size d_size d_site rec grade d_grade stage d_side? neg>\n<|ros plan>",
    ), _CARE, _WORDS, unseen=True),
)  # fmt: skip
