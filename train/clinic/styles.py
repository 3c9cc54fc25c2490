# ruff: noqa: E501  (tables of wordings: one a line)
"""The seven note styles of the training split. See terms.Style for how they are read.

Every sentence that could be taken for an answer and is not (a margin, a node, an older size, a toxicity grade, a
relative's cancer) says in its own words what it is, so that a reader of the note alone can tell.
"""

from __future__ import annotations

from train.clinic.terms import Style

WORLD: dict[str, tuple[str, ...]] = {
    "family": (
        "[mother|sister|maternal aunt|grandmother] had {her_rival}", "[father|brother|paternal uncle|grandfather] had {his_rival}",
        "a [sister|niece] treated elsewhere for {her_rival}", "the [brother|cousin Robert] lives with {his_rival}",
    ),
    "benign": (
        "simple renal cyst", "hepatic hemangioma", "[colloid|benign] thyroid nodule", "shoulder lipoma", "calcified lung granuloma",
        "adrenal adenoma", "ovarian cyst of simple type", "gastric leiomyoma", "breast fibroadenoma",
    ),
    "other_hist": (
        "small cell carcinoma", "squamous cell carcinoma", "lymphoma", "neuroendocrine carcinoma", "metastatic melanoma", "sarcoma", "carcinoma in situ",
    ),
}  # fmt: skip

_WORDS: dict[str, tuple[str, ...]] = {
    "size": ("{a} cm", "{a} cm", "{am} mm", "{a} x {b} cm", "{a} x {b} x {c} cm", "{am} x {bm} mm"),
    "left": ("left",), "right": ("right",), "bilateral": ("bilateral",),
    "join": ("{hist} of {where}", "{hist}, {where}", "{hist} involving {where}", "{hist} arising in {where}"),
    "stage": ("stage {x}", "AJCC stage {x}", "stage group {x}"),
    "ER": ("ER", "estrogen receptor", "estrogen receptor (ER)"),
    "PR": ("PR", "progesterone receptor", "progesterone receptor (PR)"),
    "HER2": ("HER2", "HER2/neu", "HER2 by IHC"),
    "positive": ("{r} positive", "{r} positive ({pct}%)", "{r} strongly positive", "{r}: positive, {pct}%"),
    "negative": ("{r} negative", "{r} negative (0%)", "{r}: negative", "{r} not expressed"),
    "HER2_positive": ("{r} positive (3+)", "{r} 3+", "{r} 2+ with amplification by FISH"),
    "HER2_negative": ("{r} negative (1+)", "{r} negative (0)", "{r} 1+", "{r} 2+ but FISH not amplified"),
    "HER2_equivocal": ("{r} equivocal (2+)", "{r} 2+ with FISH pending", "{r} indeterminate (2+)"),
    "triple": ("triple negative", "triple-negative for ER PR and HER2"),
    "awaited": ("{r} pending", "{r} result not yet available"),
    "listing": (", ", "; ", " and "),
}  # fmt: skip

_TERSE_WORDS = _WORDS | {
    "size": ("{a} cm", "{am}mm", "{a}x{b} cm", "{a}x{b}x{c}cm"),
    "left": ("L", "Lt"), "right": ("R", "Rt"), "bilateral": ("bilat", "B/L"),
    "join": ("{hist}, {where}", "{hist} - {where}", "{where} {hist}", "{hist} {where}"),
    "stage": ("St {x}", "stg {x}", "stage {x}"),
    "ER": ("ER",), "PR": ("PR",), "HER2": ("HER2", "Her2", "H2N"),
    "positive": ("{r}+", "{r}(+)", "{r} pos {pct}%"), "negative": ("{r}-", "{r}(-)", "{r} neg"),
    "HER2_positive": ("{r} 3+", "{r}+", "{r} amp"),
    "HER2_negative": ("{r}-", "{r} 0", "{r} 1+", "{r} neg"),
    "HER2_equivocal": ("{r} 2+ FISH pend", "{r} equiv"),
    "triple": ("TNBC", "triple neg"), "awaited": ("{r} pend",), "listing": (" ", "/", ", "),
}  # fmt: skip

_PATH: dict[str, tuple[str, ...]] = {
    "open": (
        "{age}-year-old {person} with {complaint}.", "{complaint} in a {person} aged {age}.",
        "{age} year old {sex}; {complaint}, biopsy proven malignancy.",
        "{person}, {age} years, referred for {op} after {complaint}.",
    ),
    "gross": (
        "Received [fresh|in formalin] is a {op} specimen [measuring|of] {size_spec}, [oriented by sutures|inked black|unoriented].",
        "The container holds [a single|one] {op} specimen, {size_spec} overall[, weighing {n}4{n} g|].",
        "The specimen, {size_spec} in aggregate, is [serially sectioned|bread-loafed] and inked.",
    ),
    "size": (
        "[Sectioning|Slicing] reveals a [firm|tan-white|ill-defined|gray] [mass|tumor|lesion] [measuring|of] {size}.",
        "The [tumor|invasive tumor|neoplasm] is {size} [in greatest extent|on microscopic measurement|].",
        "A [firm|friable|stellate] {size} [mass|tumor] is [identified|present|seen on the cut surface].",
        "Two [foci|nodules] of tumor are found, {size_less} and {size}[; they are separate|].",
        "Of two tumor nodules the [larger|dominant one] spans {size}, the other {size_less}.",
        "The cut surface shows a main [tumor|mass] of {size} and a satellite of {size_less}.",
    ),
    "d_size": (
        "The [closest|nearest] margin lies {mm} mm from the tumor.", "Tumor comes within 0.{n} cm of the [deep|inked] margin.",
        "{need_nodes}The largest nodal deposit measures {mm} mm.", "[Also present|Separately noted] is a {benign}, {size_small}.",
        "An incidental {benign} of {size_any} is noted.", "The biopsy site cavity is {size_small}.",
        "[Preoperative|Prior] [imaging|CT|MRI] had suggested a lesion of {size_old}.",
        "Before [neoadjuvant therapy|preoperative chemotherapy] the lesion had measured {size_old}.", "In the imaging report of {date}, before any treatment, the tumor is {size_old}.", "In the radiology report, not borne out here, the mass measures {size_old}.",
        "A clip is found {mm} mm from the edge of the [cavity|mass].",
    ),
    "hist": (
        "Sections show {hist}.", "The [tumor|neoplasm] is [a|classified as] {hist}.",
        "Microscopy [confirms|reveals] {hist}, {grade}.", "Histologically this is {hist}, {grade}.",
    ),
    "dx": (
        "{dx}.", "{dx}, {grade}.", "{dx}, {size}, {grade}.", "{dx}, {size}.", "{dx}; {grade}; {stage}.",
    ),
    "grade": (
        "The [tumor|carcinoma] is {grade}.", "[Tumor grade|Histologic grade]: {grade}.", "It is graded as {grade}.", "Overall it is {grade}, with {n} mitoses per field.",
        "There is no disagreement on the grade: {grade}.", "Previous reports left the grade open; it is now settled as {grade}.", "With no area of higher or lower grade, this is {grade}.",
    ),
    "d_grade": (
        "The [earlier|core] biopsy had been called {grade_old}; the resection is definitive.", "On the needle core the tumor was {grade_old}.", "A minor area would by itself be {grade_old}, which does not change the result.",
        "In the small core sample that came first, the tumor was graded as {grade_old}.", "According to the outside biopsy report, not confirmed here, overall it is {grade_old}.",
        "{need_breast}Ductal carcinoma in situ of nuclear grade {g} is adjacent.", "{need_breast}Associated in situ component, [high|intermediate] nuclear grade.",
        "Background [dysplasia|atypia], [low|high] grade, is seen away from the tumor.",
        "Treatment effect is scored as tumor regression grade {g}.",
    ),
    "stage": ("[Pathologic stage|Stage]: {stage}.", "The findings correspond to {stage}.", "Staging summary: {stage}.", "No further revision is expected: {stage}.", "Prior staging is replaced; the final one is {stage}."),
    "d_stage": ("Imaging before surgery had suggested {tnm_old}.", "On the request form, filled in before surgery, the findings correspond to stage {stage_old}.", "In the radiology report, not confirmed here, staging summary: stage {stage_old}.", "[Clinical stage before surgery|Stage assigned before resection] had been {stage_old}.", "Request form states clinical stage {stage_old}; superseded by this report."),
    "d_rec": ("{need_breast}Receptors on the earlier core biopsy had been read as {rec_old}; they were repeated here.", "{need_breast}The cancer of {year} had other receptors: {rec_old}."),
    "rec": ("[Receptor studies|Immunohistochemistry|Biomarkers]: {rec}.", "[By immunostain|On immunohistochemistry] the tumor cells are {rec}.", "Prognostic markers show {rec}.", "No repeat of the markers is needed: {rec}."),
    "no_size": ("Tumor size cannot be [determined|assessed] because the specimen is fragmented.", "Extent of tumor is not measurable."),
    "no_grade": ("Grade cannot be assessed.", "Grading is [deferred|not applied] after treatment."),
    "no_stage": ("Stage is deferred to the treating team.",),
    "no_rec": ("{need_breast}ER, PR and HER2 studies are pending[ and will be reported separately|].", "{need_breast}Receptor studies have been ordered."),
    "neg": (
        "[Lymphovascular|Perineural|Angiolymphatic] invasion is not [identified|seen].", "No evidence of {other_hist}.", "There is no {other_hist} in the sections examined.",
        "Stains for {other_hist} are negative.", "{need_clean}All {nodes} lymph nodes are free of tumor.", "Margins are [uninvolved|negative|clear].",
        "{need_paired}The separately submitted {other_side} specimen shows no tumor.",
    ),
    "family": ("Family history: {family}.", "The request notes that {family}.", "{family}."),
    "prior": (
        "Past history of {rival}.", "In {year} this department reported {rival}.", "On file from {year}: {rival}; not related to the present tumor.",
        "The same patient was treated for {rival} {n} years before the present specimen.", "{rival} was excised in {year}.", "A tumor of {year}, {rival}, was compared and is of different origin.",
        "Diagnosis of {year}: {rival}.", "Sections of {year} showed {rival}.", "Microscopy in {year} confirmed {rival}.", "One more cancer is on file. That one was {rival}.", "An old block was pulled for comparison. It shows {rival}, a cancer of {year}.", "The patient has two cancers. The other one, not examined here, is {rival}.",
    ),
    "d_site": (
        "[Random|Mapping] sections of the {other_site} show no tumor.", "The {other_site} is [normal|uninvolved|unremarkable].", "The core biopsy had suggested {other_type}; this is not [borne out|confirmed] here.",
        "{need_paired}The requisition reads {other_side} in error.", "{other_type} was considered and excluded by immunostains.", "The first report of {other_type}, {grade_old}, is amended by this one.",
        "According to the outside report, not confirmed here, this is {other_type}.", "In the small core sample that came first, sections show {other_type}.", "In the operation note, which is mistaken, the tumor is of the {other_site}.",
    ),
    "other": (
        "Representative sections are submitted in cassettes A1 to A{n}.", "Controls reacted [appropriately|as expected].", "Findings were discussed with the surgeon by telephone.",
        "The case was reviewed at the intradepartmental conference.", "Block A{n} is suitable for molecular testing.",
    ),
    "l_hist": ("[Histologic type|Diagnosis|Tumor type]: {hist}",),
    "l_site": ("[Tumor site|Site|Tumor location]: {site}",),
    "l_side": ("[Laterality|Specimen laterality|Side]: {side}",),
    "l_grade": ("[Histologic grade|Grade|Tumor grade]: {grade}",),
    "l_size": ("[Tumor size|Greatest dimension|Size of tumor]: {size}", "Tumor size: {size} (additional focus {size_less})", "Tumor foci: {size_less} and {size}"),
    "l_stage": ("[Pathologic stage|Stage|Stage classification]: {stage}",),
    "l_rec": ("[Receptors|Biomarkers|Hormone receptors and HER2]: {rec}",),
    "l_margin": ("Margins: [negative|uninvolved], closest {mm} mm", "Distance to closest margin: 0.{n} cm", "Margin status: clear by {mm} mm"),
    "l_nodes": ("{need_clean}Lymph nodes: 0 of {nodes} involved", "{need_nodes}Nodes examined: {nodes}; largest deposit {mm} mm", "{need_nodes}Nodal status: {n} of {nodes} positive"),
    "l_other": ("Lymphovascular invasion: not identified", "Perineural invasion: absent", "Additional findings: {benign}, {size_any}", "Treatment effect: regression grade {g}", "Prior imaging size: {size_old}", "Clinical stage before surgery: {stage_old}", "Biopsy grade (earlier specimen): {grade_old}", "Other sites sampled: {other_site}, no tumor", "Biopsy diagnosis (superseded): {other_type}", "Previous malignancy: {rival}", "Histologic diagnosis of {year}: {rival}", "Second primary, not in this specimen: {rival}", "Clinical TNM on request: {tnm_old}", "Request form (superseded), tumor site: {other_site}", "Request form (superseded), histologic type: {other_type}", "{need_paired}Request form (wrong), laterality: {other_side}", "Biopsy (superseded), histologic grade: {grade_old}", "Imaging (superseded), tumor size: {size_old}", "Imaging (superseded), stage: stage {stage_old}"),
}  # fmt: skip

_CLINIC: dict[str, tuple[str, ...]] = {
    "open": (
        "{age}-year-old {person} seen [today|in clinic] [for follow-up|to discuss treatment], initially with {complaint}.",
        "This {age} year old {person} [presented|came to us] with {complaint}.",
        "The patient is a {person} of {age} who [developed|noticed] {complaint} [{n} months ago|last spring|over {n} weeks].",
        "{complaint} led to the work-up of this {age}-year-old {person}.",
    ),
    "dx": (
        "[Biopsy|Pathology] showed {dx}.", "With no prior warning, {dx} was found.", "The patient, whose father also smoked, has {dx}.", "No doubt remains that this is {dx}.", "[Work-up|Evaluation] [established|confirmed] {dx}.", "[He or she|The patient] has {dx}, {grade}.",
        "Diagnosis: {dx}.", "{op} revealed {dx}.", "Final pathology from {op}: {dx}, {grade}.", "Tissue diagnosis is {dx}, {stage}.",
        "[Initial concern was for|The first reading raised] {other_hist}, but [expert review|repeat biopsy] showed {dx}.",
    ),
    "size": (
        "The [tumor|primary|mass] [measured|was] {size}[ at surgery| on pathology|].", "[Pathologic|Measured] size was {size}.",
        "[CT|MRI|Ultrasound] of the primary shows {size}.", "The [primary|index] lesion is {size}[ on the current scan|].",
        "There were two tumors in the specimen, {size} and {size_less}.", "The smaller focus was {size_less}; the dominant one {size}.",
        "The primary, {size_old} on the scan in {date}, now measures {size}.", "The family saw the pictures; the tumor is {size}.", "No change since {date}: the tumor still measures {size}.", "On pathology {size}, although imaging had predicted {size_old}.",
    ),
    "d_size": (
        "[CT|Staging CT] also notes a {benign} of {size_any}, unchanged.", "A {size_any} {benign} needs no follow-up.", "{need_clean}The largest node is {mm} mm and not suspicious.",
        "Surgical margin was {mm} mm.", "There is a healed scar of {size_any}.", "The mass was {size_old} on the scan before surgery.", "On the scan that was done before any treatment the primary is {size_old}.", "Per the outside report, since superseded, the tumor measured {size_old}.", "Ultrasound before treatment showed {size_old}.", "The tumor removed in {year} had measured {size_any}.", "Spleen measures 1{n}.0 cm.", "{need_knife}{need_tumor}Closest margin {mm} mm.",
    ),
    "grade": ("It is {grade}.", "Grade: {grade}.", "The pathologist graded it as {grade}.", "Histology was reported as {grade}.", "No second opinion was needed on the grade: {grade}.", "The family asked about the grade; it is {grade}.", "There is no doubt about the grade: {grade}."),
    "d_grade": (
        "[He or she|The patient] has grade {g} neuropathy from earlier treatment.", "Grade 2 fatigue and grade 1 nausea persist.", "[Mucositis|Diarrhea] reached grade 3 but has resolved.",
        "An outside biopsy had been read as {grade_old}, corrected on resection.", "On the outside needle core, which was too small to be reliable, it is {grade_old}.", "In the first report, since withdrawn, histology was reported as {grade_old}.", "The needle core was {grade_old}; the surgical specimen decides.", "Another hospital called it {grade_old}, which our review overturned.", "Echocardiogram: grade 1 diastolic dysfunction.",
    ),
    "stage": ("[Stage|Staging]: {stage}.", "This is {stage} disease.", "[He or she is|The disease is] staged as {stage}.", "After complete work-up: {stage}.", "The family asked how far it has gone: {stage}.", "No doubt remains about the stage: {stage}.", "With the earlier questions settled, this is {stage}."),
    "d_stage": ("The first scan suggested {tnm_old}, surgery showed otherwise.", "In the referral letter, written before surgery, this is stage {stage_old} disease.", "At first presentation, long before the operation, the disease is staged as stage {stage_old}.", "The referring hospital staged it as {stage_old}, since revised.", "Before surgery it had been thought to be stage {stage_old}.", "[Chronic kidney disease stage 3|Stage 2 pressure injury of the heel|Stage 1 hypertension] is also noted.", "Clinical stage at presentation was {stage_old}; pathology revised this."),
    "rec": ("Receptors: {rec}.", "The tumor is {rec}.", "[Biomarkers|Marker studies] came back {rec}.", "No change in the markers: {rec}."),
    "no_size": ("Exact tumor size is not in the outside records.",),
    "no_grade": ("Grade was not reported.",),
    "no_stage": ("Staging is incomplete; scans are scheduled.", "Stage to be assigned after imaging."),
    "no_rec": ("{need_breast}Receptor results are pending.", "{need_breast}ER, PR and HER2 have been requested and are awaited."),
    "d_side": (
        "Port in the {any_side} chest wall is clean.", "{any_side} knee replacement in {year}.", "{need_paired}The {other_side} side is normal on examination and imaging.", "Chronic {any_side} shoulder pain, stable.",
        "{any_side} cataract surgery last year.", "{need_paired}No abnormality on the {other_side}.",
    ),
    "family": ("Family history: {family}.", "{family}.", "Relatives: {family}."),
    "prior": (
        "Past medical history includes {rival}.", "In {year} the patient was treated for {rival}.", "{rival} was [resected|cured] in {year}.", "This is a second cancer; the first, {n} years ago, was {rival}.",
        "A separate cancer, {rival}, is under the care of another hospital.", "Long-term survivor of {rival}.", "{year}: {rival}, treated and quiet since.",
        "Pathology in {year} showed {rival}.", "Diagnosis in {year}: {rival}.", "Work-up in {year} established {rival}.", "There has been one other cancer. That one was {rival}.", "Another hospital looks after a second cancer. Over there it is {rival}.", "{rival} was dealt with in {year}.", "The other cancer is stable. It is {rival}.",
    ),
    "d_site": (
        "The {other_site} was [biopsied as well and is benign|clear on imaging].", "The outside report spoke of {other_type}; our pathologists disagree.", "{need_paired}The referral letter says {other_side}, which is a mistake.",
        "{other_type} was ruled out.", "In the first report, since withdrawn, diagnosis: {other_type}.", "Outside needle cores, too small to be reliable, showed {other_type}.", "According to the referral letter, which is mistaken, the tumor is of the {other_site}.", "{need_paired}On the first scan report, which was wrong, it is on the {other_side} side.", "Symptoms first pointed to the {other_site}, wrongly.", "The {other_site} had a scar from an old injury.",
    ),
    "d_rec": ("{need_breast}The needle biopsy elsewhere gave {rec_old}, superseded by the surgical specimen.", "{need_breast}Her first cancer of {year} had other receptors: {rec_old}."),
    "neg": (
        "{need_local}No [evidence of metastasis|distant spread] on [PET|CT].", "{need_local}Bone scan and brain MRI are negative for metastases.", "There is no {other_hist}.", "{need_clean}No palpable adenopathy.", "{need_local}Liver and lungs are clear.",
    ),
    "ros": (
        "Denies [fever|chills], [weight loss|night sweats] and [bone pain|headache].", "Appetite is [good|fair]; sleep is [poor|normal].", "[Mild|Moderate] fatigue, [no|occasional] nausea.",
        "No [cough|dyspnea], no [abdominal pain|diarrhea].",
    ),
    "exam": ("BP 1{n}2/7{n}, pulse 7{n}, weight {kg} kg, afebrile.", "ECOG {g}[;|,] lungs clear, abdomen soft.", "Well appearing, no distress[, incision healed|]."),
    "labs": ("Hemoglobin 1{n}.{n}, platelets {n}12, creatinine 0.{n}.", "WBC {n}.{n}, ANC {n}.1, LFTs normal.", "CBC and chemistry [within normal limits|unremarkable]."),
    "plan": (
        "Plan: [chemotherapy|adjuvant therapy] for {n} cycles, return in {n} weeks.", "[Continue surveillance|Follow up] with labs and imaging in {n} months.", "Referred to radiation oncology and genetics.", "We discussed options; the patient wishes to think it over.",
    ),
}  # fmt: skip
_CLINIC["dx"] = tuple(t.replace("[He or she|The patient]", "The patient") for t in _CLINIC["dx"])
_CLINIC["d_grade"] = tuple(t.replace("[He or she|The patient]", "The patient") for t in _CLINIC["d_grade"])
_CLINIC["stage"] = tuple(t.replace("[He or she is|The disease is]", "The disease is") for t in _CLINIC["stage"])

_TERSE: dict[str, tuple[str, ...]] = {
    "open": ("{age}{S} w/ {complaint}.", "{age} yo {S}, {complaint} x{n} mo.", "{S} {age}, f/u. c/o {complaint}."),
    "dx": ("Dx: {dx}.", "Path: {dx}, {grade}.", "s/p {op}: {dx}.", "Bx -> {dx}.", "{dx} s/p {op}.", "Imp: {dx}, {stage}."),
    "size": ("{size} on path.", "T {size}.", "Mass {size}.", "1' tumor {size}, was {size_old} on CT.", "2 foci: {size_less} + {size}.", "Path {size} (MRI {size_old})."),
    "d_size": ("Incid {benign} {size_any}, stable.", "Margin {mm} mm.", "{need_clean}LN {mm}mm, benign.", "Scar {size_any}.", "Pre-op US {size_old}.", "Per outside CT, pre-op: mass {size_old}.", "{year} tumor {size_any}.", "Spleen 1{n} cm."),
    "grade": ("{grade}.", "Gr: {grade}.", "Histo {grade}.", "No change, {grade}.", "D/w family: {grade}."),
    "d_grade": ("Gr {g} neuropathy.", "Fatigue gr 2, nausea gr 1.", "Core bx was {grade_old}.", "Outside core, later re-read: histo {grade_old}.", "Outside path {grade_old}, re-read.", "Gr 3 mucositis, resolved."),
    "stage": ("{stage}.", "Stg: {stage}.", "Final {stage}.", "No change, {stage}.", "D/w family: {stage}."),
    "d_stage": ("CKD st 3.", "Per referral, pre-op: stg {stage_old}.", "Clin stg {stage_old} pre-op.", "Outside stg {stage_old}, revised.", "CT {tnm_old}, not confirmed at surgery.", "Pressure ulcer stg 2."),
    "rec": ("{rec}.", "Recs: {rec}.", "IHC {rec}."),
    "no_size": ("Size n/a.",), "no_grade": ("Gr not given.",), "no_stage": ("Staging w/u pending.",), "no_rec": ("{need_breast}Recs pend.",),
    "d_side": ("{any_side} port ok.", "{any_side} TKA {year}.", "{need_paired}{other_side} side neg.", "{any_side} shoulder pain, chr."),
    "family": ("FHx: {family}.", "Fam: {family}."),
    "prior": ("PMH: {rival}.", "h/o {rival}, NED.", "{year}: {rival}.", "2nd ca; 1st {rival} {n} y ago.", "Dx {year}: {rival}.", "Path {year}: {rival}.", "Bx {year} -> {rival}.", "Other ca: {rival}.", "1st ca {year}: {rival}.", "Other team tx {rival}.", "{rival} {year}, cured."),
    "d_site": ("{other_site} bx neg.", "Outside read {other_type}, revised.", "Outside bx, later re-read: dx: {other_type}.", "Referral (wrong): {other_site}.", "{need_paired}Ref says {other_side} - wrong.", "{other_type} r/o.", "{other_site} clear."),
    "d_rec": ("{need_breast}Core bx was {rec_old}, repeated on excision.", "{need_breast}{year} tumor {rec_old}."),
    "neg": ("{need_local}No mets on CT.", "{need_local}PET neg.", "No {other_hist}.", "{need_clean}No LAD."),
    "ros": ("Denies F/C/NS.", "No CP/SOB.", "Appetite ok.", "Mild fatigue, no N/V."),
    "exam": ("VSS. ECOG {g}.", "BP 1{n}2/7{n}, wt {kg} kg.", "Abd soft, NT."),
    "labs": ("Hgb 1{n}.{n}, plt {n}30, Cr 0.{n}.", "CBC/CMP wnl."),
    "plan": ("P: chemo C{n}, RTC {n} wk.", "P: CT in {n} mo, labs.", "P: RT consult, genetics.", "Cont current tx."),
}  # fmt: skip

_NURSING = _CLINIC | {
    "open": ("{complaint}, follow-up visit.", "Treatment visit, cycle {n}; history of {complaint}.", "Toxicity check; first seen for {complaint}."),
    "where_treated": ("{dx}.", "{dx}, {grade}.", "{dx}; {stage}."),
    "ros": (
        "Fatigue: [none|grade 1|grade 2]. Nausea: [none|grade 1].", "Pain: {n}/10, {any_side} [hip|shoulder|flank].", "Skin: [intact|grade 1 erythema|dry]. Nutrition: [good|fair] intake.",
        "Neuropathy: [absent|grade 1|grade 2 in feet]. Sleep: [restless|adequate].", "Respiratory: no cough. Bowel: [regular|loose stools, grade 1].", "Psychosocial: lives with [spouse|family], coping [well|poorly].", "Fall risk: [low|moderate]. Mobility: independent.",
    ),
}  # fmt: skip
_NURSING["dx"] = _NURSING["where_treated"]

_DICTATED_WORDS = _WORDS | {
    "size": ("{a} centimeters", "{am} millimeters", "{a} by {b} centimeters", "{a} by {b} by {c} centimeters"),
    "stage": ("stage {x}", "clinical and pathologic stage {x}"),
    "positive": ("{r} is positive", "{r} positive at {pct} percent"), "negative": ("{r} is negative", "{r} negative"),
    "HER2_positive": ("{r} is positive at three plus", "{r} amplified"),
    "HER2_negative": ("{r} is negative", "{r} is one plus which is negative", "{r} is two plus and not amplified on FISH"),
    "HER2_equivocal": ("{r} is equivocal at two plus", "{r} is two plus with FISH still to come"),
    "listing": (" and ", ", "),
}  # fmt: skip
_DICTATED = _CLINIC | {
    "open": (
        "I had the pleasure of seeing this {age}-year-old {person} who came in with {complaint}.", "As you know this is a {age}-year-old {person} with {complaint} going back {n} months.",
        "Thank you for asking us to see this pleasant {person} of {age} with {complaint}.",
    ),
    "dx": ("What was found was {dx}.", "[He|She] was found to have {dx} and this was {grade}.", "[Turned out|It proved] to be {dx}.", "So in summary we are dealing with {dx}.", "I told the family that this is {dx}.", "There was talk of {other_hist} but the final word is {dx}."),
    "size": ("It measured {size}.", "The thing measures {size} now and it was {size_old} before.", "There were two spots, one {size_less} and one {size}.", "Size by pathology {size}, by the scan {size_old}.", "The tumor itself came to {size}."),
    "grade": ("On grading it is {grade}.", "In terms of grade it is {grade}.", "I told the family that on grading it is {grade}.", "There was no argument about grade, it is {grade}."),
    "stage": ("That makes it {stage}.", "We would stage this as {stage}.", "I told the family this is {stage}.", "There was no argument about staging, it is {stage}."),
    "rec": ("As for the receptors, {rec}.", "On the markers, {rec}."),
    "family": ("Asked about relatives, {family}.", "In the family {family}."),
    "prior": ("Of note back in {year} there was {rival}.", "The other thing we know of is {rival} from {year}.", "You will recall {rival} some {n} years back.", "Not to be mixed up with {rival} that was dealt with in {year}.", "In {year} what was found was {rival}.", "There is one other cancer. That one is {rival} and another team looks after it."),
    "plan": ("My recommendation is {n} cycles of treatment and then we will rescan.", "I have asked for a repeat scan in {n} months period.", "We will see {him} back in {n} weeks period new paragraph."),
}  # fmt: skip
_DICTATED["dx"] = tuple(t.replace("[He|She] was", "The patient was") for t in _DICTATED["dx"])

_BOARD = _CLINIC | {
    "open": ("{age} y {sex}, {complaint}.", "Presented by surgery: {age}-year-old {sex} with {complaint}."),
    "dx": ("- Pathology: {dx}", "- Tumor: {dx}, {grade}", "- Diagnosis under discussion: {dx}"),
    "size": ("- Size: {size}", "- Primary measures {size} on pathology (imaging {size_old})", "- Two lesions, {size} and {size_less}"),
    "d_size": ("- Margin {mm} mm", "- MRI before treatment {size_old}", "- Imaging before treatment: primary measures {size_old}", "- Incidental: {benign} {size_any}", "{need_clean}- Largest node {mm} mm, reactive"),
    "grade": ("- Grade: {grade}", "- Reviewed and graded {grade}", "- No dissent on grade: {grade}"),
    "d_grade": ("- Toxicity so far: grade {g} neutropenia", "- Outside biopsy grade: {grade_old}, revised at review", "- Superseded outside report: reviewed and graded {grade_old}", "- Core biopsy {grade_old}, resection decides"),
    "stage": ("- Staging: {stage}", "- Consensus {stage}", "- No dissent on stage: {stage}", "- Earlier questions settled: {stage}"),
    "d_stage": ("- Initial clinical stage {stage_old}, changed after surgery", "- On referral, before surgery, staging: stage {stage_old}", "- Comorbidity: CKD stage 3"),
    "rec": ("- Markers: {rec}", "- Receptor profile: {rec}"),
    "no_stage": ("- Staging: to be completed",), "no_size": ("- Size: not recorded",), "no_grade": ("- Grade: not reported",), "no_rec": ("{need_breast}- Markers: awaited",),
    "d_side": ("- {any_side} hip replacement {year}", "{need_paired}- {other_side} side: benign findings only"),
    "family": ("- Family: {family}",), "prior": ("- Other malignancy: {rival}", "- {year}: {rival}", "- Treated {n} years ago: {rival}", "- Pathology of {year}: {rival}", "- Diagnosis in {year}: {rival}", "- Not for discussion today: {rival}", "- Second primary, other team: {rival}"),
    "d_site": ("- {other_site}: biopsied, benign", "- Referring report of {other_type}: not upheld", "- Superseded outside report, pathology: {other_type}", "- Referral sheet (wrong), tumor of the {other_site}", "{need_paired}- Referral sheet lists {other_side}: wrong side", "- {other_type}: excluded"),
    "d_rec": ("{need_breast}- Core biopsy markers (superseded): {rec_old}", "{need_breast}- Markers of the {year} cancer: {rec_old}"),
    "neg": ("{need_local}- PET: no metastases", "- No {other_hist} on review", "{need_clean}- Nodes clinically negative"),
    "plan": ("- Recommendation: surgery first, then systemic treatment", "- Recommendation: {n} cycles, restage", "- Recommendation: radiation, genetics referral", "- Recommendation: trial screening"),
}  # fmt: skip

_FACTS = "<~size d_size d_side d_site> <~grade d_grade>"

STYLES: tuple[Style, ...] = (
    Style("synoptic", (
        "SURGICAL PATHOLOGY REPORT\nClinical history: <open> <~family? prior>\nProcedure: {op}\nGross description: <gross> <d_size?>\nSYNOPTIC REPORT\n<~|l_hist l_site l_side l_grade l_size l_margin l_nodes l_stage l_rec l_other l_other>\nComment: <~neg no_rec? d_grade? other>",
        "PATHOLOGY, CANCER CHECKLIST\nSpecimen: {op}\n<|l_hist l_site l_side>\n<~|l_size l_margin l_grade l_other>\n<~|l_nodes l_stage l_rec l_other l_other>\nHistory provided: <open> <~prior family?>\nNote: <~neg other d_size?>",
    ), _PATH, _WORDS, pathology=True),
    Style("surgical", (
        "CLINICAL INFORMATION: <open> <~prior family?>\nGROSS DESCRIPTION: <gross> <~size d_size d_size?>\nMICROSCOPIC DESCRIPTION: <~hist grade d_grade d_site> <~stage d_stage rec d_rec>\nFINAL DIAGNOSIS: {op}, {where}: malignant. <other>",
        "FINAL DIAGNOSIS\n{op}: <dx>\n<~size d_size d_site grade d_grade neg>\n<~rec d_rec stage d_stage>\nGROSS: <gross> <other>\nHISTORY: <open> <~family prior>",
        "Diagnosis: <dx> <~stage rec d_rec>\nComment: <~size d_size d_site grade d_grade neg neg?> <d_stage>\nHistory: <open> <~family? prior>\nMacroscopic: <gross> <other>",
    ), _PATH, _WORDS, pathology=True),
    Style("clinic", (
        f"HISTORY OF PRESENT ILLNESS: <open> <dx> {_FACTS} <~stage d_stage rec d_rec>\nPAST HISTORY: <~prior d_side?> <family>\nREVIEW OF SYSTEMS: <ros>\nEXAM: <exam> <labs?>\nASSESSMENT AND PLAN: <neg> <plan>",
        f"Oncology follow-up. <open> <~prior family> <dx> <~rec d_rec stage> {_FACTS} <d_stage> <ros> <exam> <neg> <plan>",
        f"CONSULTATION\n<open> <~prior family?>\n<~neg dx ros?>\n{_FACTS} <~rec d_rec stage d_stage>\n<exam> <labs>\n<plan>",
    ), _CLINIC, _WORDS),
    Style("terse", (
        "<open> <dx> <~size d_size d_site grade d_grade stage d_stage rec d_rec>\n<~prior family d_side>\n<ros> <exam> <labs>\n<neg> <plan>",
        "HPI: <open> <~prior family?>\nOnc: <dx> <~size d_site grade rec d_rec stage d_size d_grade?>\nROS: <ros> PE: <exam> <d_side>\nLabs: <labs>\nA/P: <neg> <d_stage> <plan>",
    ), _TERSE, _TERSE_WORDS, terse=True),
    Style("nursing", (
        "REASON FOR VISIT: <open>\nTREATMENT SITE: <dx>\nSUBJECTIVE: {age}-year-old {person}. <~family prior d_side>\nNURSING REVIEW OF SYSTEMS: <ros> <ros> <ros?>\nOBJECTIVE: <exam> <~size d_size d_site> <~grade d_grade rec d_rec stage d_stage>\nLABORATORY RESULTS: <labs>\nPLAN: <plan>",
        "REASON FOR VISIT: <open>\nSUBJECTIVE: {age}-year-old {person}. <~dx prior> <~stage d_stage rec d_rec>\nNURSING REVIEW OF SYSTEMS: <ros> <ros>\nOBJECTIVE: <exam> <d_side> <~size d_size d_site grade d_grade> <neg>\nLABORATORY RESULTS: <labs> <family?>",
    ), _NURSING, _WORDS),
    Style("dictated", (
        f"<open> <dx> {_FACTS} <~rec d_rec stage d_stage> <~prior family> <ros> On examination <exam> <neg> <plan>",
        f"Dictated letter. <open> <~prior family?> <~ros neg> <dx> <~rec d_rec stage> {_FACTS} <exam> <plan>",
    ), _DICTATED, _DICTATED_WORDS),
    Style("board", (
        "TUMOR BOARD SUMMARY\n<open>\n<|dx>\n<~|size d_size d_site grade d_grade? rec d_rec stage d_stage prior family? neg>\n<|d_side? plan>",
        "MULTIDISCIPLINARY CONFERENCE {date}\n<open>\n<~|dx prior family>\n<~|size d_size d_site stage d_grade rec grade d_side?>\n<|neg plan>",
    ), _BOARD, _WORDS),
)  # fmt: skip
