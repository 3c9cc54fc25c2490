# ruff: noqa: E501  (a table: one wording a line)
"""What the clinic knows about the 17 cancers: sites and their codes, histologies, grading, staging, sizes.

Wordings come in pairs: those of the training styles and those of the unseen styles. A wording is a template with
choices (`[a|b]`), see markup.py. Stages are anatomic groups of the AJCC's 8th edition with a T, N and M that
belong to them and the tumour sizes in mm for which that T is possible; they are plausible, not a staging reference.
"""

from __future__ import annotations

from train.clinic.terms import Cancer, Wording, histologies, sites, stages, words

SIDE_DIGIT = {"right": "1", "left": "2", "bilateral": "3"}

GRADES: dict[str, dict[int, Wording]] = {
    # system -> grade -> names as an adjective phrase that can stand alone ("… , moderately differentiated")
    "differentiation": {
        1: words("well differentiated; [G1|WD]; low-grade; grade I of III"),
        2: words("moderately differentiated; [G2|MD]; [intermediate-grade|of intermediate differentiation]; grade II of III"),
        3: words("poorly differentiated; [G3|PD]; high-grade; grade III of III"),
    },
    "nottingham": {
        1: words("[Nottingham grade 1|Nottingham grade I (score 5 of 9)]; [Nott gr 1|G1]; [Elston-Ellis grade I|low-grade by Bloom-Richardson criteria]; B-R I"),
        2: words("[Nottingham grade 2|Nottingham grade II (score 7 of 9)]; [Nott gr 2|G2]; [Elston-Ellis grade II|intermediate by Bloom-Richardson criteria]; B-R II"),
        3: words("[Nottingham grade 3|Nottingham grade III (score 8 of 9)]; [Nott gr 3|G3]; [Elston-Ellis grade III|high-grade by Bloom-Richardson criteria]; B-R III"),
    },
    "nuclear": {
        1: words("[Fuhrman grade 1|ISUP nuclear grade 1]; FG1; nucleolar grade I of IV; nucleolar I/IV"),
        2: words("[Fuhrman grade 2|ISUP nuclear grade 2]; FG2; nucleolar grade II of IV; nucleolar II/IV"),
        3: words("[Fuhrman grade 3|ISUP nuclear grade 3]; FG3; nucleolar grade III of IV; nucleolar III/IV"),
        4: words("[Fuhrman grade 4|ISUP nuclear grade 4]; FG4; nucleolar grade IV of IV; nucleolar IV/IV"),
    },
    "gleason": {
        1: words("[Gleason score 3+3=6 (Grade Group 1)|Grade Group 1]; [GS 3+3|GG1]; [ISUP group one|Gleason sum 6, pattern 3 only]; ISUP grp I"),
        2: words("[Gleason score 3+4=7 (Grade Group 2)|Grade Group 2]; [GS 3+4|GG2]; [ISUP group two|Gleason sum 7 with predominant pattern 3]; ISUP grp II"),
        3: words("[Gleason score 4+3=7 (Grade Group 3)|Grade Group 3]; [GS 4+3|GG3]; [ISUP group three|Gleason sum 7 with predominant pattern 4]; ISUP grp III"),
        4: words("[Gleason score 4+4=8 (Grade Group 4)|Grade Group 4]; [GS 4+4|GG4]; [ISUP group four|Gleason sum 8]; ISUP grp IV"),
    },
    "figo": {
        1: words("FIGO grade 1; FIGO G1; [low-grade architecture|FIGO I architecture]; FIGO gr. I"),
        2: words("FIGO grade 2; FIGO G2; FIGO II architecture; FIGO gr. II"),
        3: words("FIGO grade 3; FIGO G3; [high-grade architecture|FIGO III architecture]; FIGO gr. III"),
    },
    "who": {
        2: words("WHO grade 2; WHO gr 2; grade II in the WHO scheme; WHO II"),
        3: words("WHO grade 3; WHO gr 3; grade III in the WHO scheme; WHO III"),
        4: words("WHO grade 4; WHO gr 4; grade IV in the WHO scheme; WHO IV"),
    },
    "urothelial": {
        1: words("low grade; LG; low-grade; low gr."),
        3: words("high grade; HG; high-grade; high gr."),
    },
    "follicular": {
        1: words("grade 1; gr 1; grade I; gr. I"),
        2: words("grade 2; gr 2; grade II; gr. II"),
    },
}  # fmt: skip

CLEAR_OF_SITE = words("the {site}; {site}; the {site}; {site}")  # no side to name

CANCERS: tuple[Cancer, ...] = (
    Cancer(
        "breast cancer", "breast", 7, "F",
        sites("""
            C50.4@# ~ 5 ~ [upper outer|upper-outer] quadrant; UOQ; outer upper quadrant; up-out quad
            C50.2@# ~ 3 ~ [upper inner|upper-inner] quadrant; UIQ; inner upper quadrant; up-in quad
            C50.5@# ~ 3 ~ [lower outer|lower-outer] quadrant; LOQ; outer lower quadrant; low-out quad
            C50.9@# ~ 2 ~ breast; breast; breast; breast"""),
        histologies("""
            - ~ 6 ~ 1 2 2 3 ~ [invasive|infiltrating] ductal carcinoma; IDC; [invasive carcinoma of no special type|ductal carcinoma of invasive type]; inv duct ca
            - ~ 2 ~ 1 2 2 3 ~ [invasive|infiltrating] lobular carcinoma; ILC; [invasive carcinoma of lobular type|lobular invasive carcinoma]; inv lob ca
            - ~ 1 ~ 1 2 ~ [mucinous carcinoma|tubular carcinoma]; [mucinous ca|tubular ca]; [colloid carcinoma|mucinous breast carcinoma]; colloid ca"""),
        words("[the {site} of the {side} breast|{side} breast, {site}|the {side} breast in the {site}]; [{side} breast {site}|{site} of {side} breast]; [the {side}-hand breast at its {site}|breast ({side}), {site}]; {side} br. {site}"),
        words("[the {site} of the breast|breast, {site}]; breast {site}; the breast at its {site}; br. {site}"),
        words("[lumpectomy|partial mastectomy|mastectomy|segmental excision]; [lumpx|BCS|mast]; [wide local excision|breast-conserving excision]; wide exc."),
        words("[a palpable lump|an abnormal screening mammogram|nipple discharge|a self-detected mass]; [lump|abnl mammo|mass on SBE]; [a change noticed in the shower|a recall from screening]; recall from screening"),
        stages("IA T1b N0 M0 6 10; IA T1c N0 M0 11 20; IIA T2 N0 M0 21 50; IIA T1c N1 M0 11 20; IIB T2 N1 M0 21 50; IIIA T3 N1 M0 51 75; IIIA T2 N2 M0 21 50; IV T2 N1 M1 22 50"),
        "nottingham", (6, 75), sided=True, undetermined="9", receptors=("ER", "PR", "HER2"),
    ),
    Cancer(
        "lung cancer", "lung", 4, "FM",
        sites("""
            C34.1# ~ 4 ~ upper lobe; {S}UL; [superior lobe|apical part of the upper lobe]; upper lb
            C34.3# ~ 3 ~ lower lobe; {S}LL; [inferior lobe|basal part of the lower lobe]; lower lb
            C34.2 ~ 1 ~ middle lobe; {S}ML; middle pulmonary lobe; mid lb"""),
        histologies("""
            - ~ 4 ~ 1 2 2 3 ~ adenocarcinoma; [adeno|adenoCA]; [adenocarcinoma of acinar pattern|glandular carcinoma]; ACA
            - ~ 3 ~ 1 2 2 3 ~ squamous cell carcinoma; [SCC|SqCC]; [keratinizing squamous carcinoma|epidermoid carcinoma]; squam ca
            - ~ 1 ~ - ~ small cell carcinoma; SCLC; oat cell carcinoma; small-cell ca"""),
        words("[the {side} {site}|the {site} of the {side} lung|{side} lung, {site}]; {site}; [the {site} on the {side}|lung ({side}), {site}]; {side} {site}"),
        words("[the {site}|the {site} of the lung]; {site}; the {site}; {site}"),
        words("[lobectomy|wedge resection|VATS lobectomy]; [lobx|VATS]; [keyhole lung resection|thoracoscopic resection]; VATS resxn"),
        words("[a persistent cough|hemoptysis|an incidental nodule on chest CT]; [cough|hemoptysis|incid nodule]; [coughing up blood|a shadow on a chest film]; shadow on CXR"),
        stages("IA2 T1b N0 M0 11 20; IA3 T1c N0 M0 21 30; IB T2a N0 M0 31 40; IIA T2b N0 M0 41 50; IIB T3 N0 M0 51 70; IIIA T2a N2 M0 31 40; IIIB T3 N2 M0 51 70; IV T2a N2 M1b 31 40"),
        "differentiation", (8, 70), sided=True, undetermined="0",
    ),
    Cancer(
        "colorectal cancer", "bowel", 4, "FM",
        sites("""
            C18.0 ~ 2 ~ cecum; cecum; caecal pole; caecum
            C18.2 ~ 2 ~ ascending colon; asc colon; [ascending part of the colon|ascending limb of the large bowel]; ascend. colon
            C18.7 ~ 3 ~ sigmoid colon; sigmoid; [sigmoid loop|sigmoid part of the colon]; sigm. colon
            C20 ~ 2 ~ [rectum|mid rectum|low rectum]; rectum; [rectal ampulla|lower rectum]; rectum"""),
        histologies("""
            - ~ 5 ~ 1 2 2 2 3 ~ adenocarcinoma; [adeno|adenoCA]; [colonic-type adenocarcinoma|gland-forming carcinoma]; ACA
            - ~ 1 ~ 2 3 ~ mucinous adenocarcinoma; mucinous adenoCA; mucin-rich adenocarcinoma; mucin. ACA"""),
        CLEAR_OF_SITE, CLEAR_OF_SITE,
        words("[segmental resection|laparoscopic colectomy|bowel resection]; [lap colx|resxn]; [laparoscopic segmental excision|keyhole bowel operation]; lap excis"),
        words("[rectal bleeding|iron deficiency anemia|a change in bowel habit|a positive FIT test]; [BRBPR|IDA|+FIT]; [blood mixed with stool|tiredness with low iron stores]; low ferritin"),
        stages("I T2 N0 M0 10 50; IIA T3 N0 M0 20 80; IIIB T3 N1b M0 20 80; IIIB T3 N1a M0 22 78; IIB T4a N0 M0 30 90; IIIC T4a N2a M0 35 90; IVA T3 N2a M1a 30 80"),
        "differentiation", (12, 85),
    ),
    Cancer(
        "prostate cancer", "prostate", 3, "M",
        sites("C61 ~ 1 ~ [prostate|prostate gland]; prostate; [prostatic gland|prostate]; prost. gland"),
        histologies("""
            - ~ 5 ~ 1 2 2 3 3 4 ~ [acinar adenocarcinoma|adenocarcinoma]; [adeno|acinar adenoCA]; [adenocarcinoma of acinar type|conventional adenocarcinoma]; acin. ACA
            - ~ 1 ~ 3 4 ~ ductal adenocarcinoma; ductal adenoCA; adenocarcinoma of ductal type; duct. ACA"""),
        words("[the {site}, {side} lobe|the {side} lobe of the {site}]; {site} {side} lobe; the {side} half of the {site}; {side} half of {site}"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[radical prostatectomy|robotic prostatectomy]; [RALP|RP]; [robot-assisted removal of the gland|whole-gland excision]; robotic RRP"),
        words("[an elevated PSA|a rising PSA]; [PSA rise|elev PSA]; [a PSA found high by his physician|slow urinary stream with a high PSA]; high PSA on screen"),
        stages("IIA T1c N0 M0 5 20; IIB T2 N0 M0 6 28; IIC T2 N0 M0 8 30; IIIB T3a N0 M0 12 40; IIIB T3b N0 M0 14 42; IVA T3a N1 M0 14 42"),
        "gleason", (5, 35), sided=True,
    ),
    Cancer(
        "bladder cancer", "bladder", 2, "MMF",
        sites("""
            C67.2 ~ 3 ~ lateral wall; lat wall; [side wall|lateral surface]; side wall
            C67.4 ~ 2 ~ posterior wall; post wall; [back wall|rear wall]; back wall
            C67.1 ~ 2 ~ dome; dome; [vault|roof]; roof"""),
        histologies("""
            - ~ 4 ~ 1 3 3 ~ [papillary urothelial carcinoma|urothelial carcinoma]; [UC|pap UC]; [transitional cell carcinoma|carcinoma of urothelial type]; TCC
            - ~ 1 ~ - ~ squamous cell carcinoma; SCC; epidermoid carcinoma; squam ca"""),
        words("[the {site} of the bladder|bladder, {site}|the bladder {site}]; bladder {site}; [the {site} of the urinary bladder|bladder at the {site}]; bl. {site}"),
        words("[the {site} of the bladder|bladder, {site}|the bladder {site}]; bladder {site}; [the {site} of the urinary bladder|bladder at the {site}]; bl. {site}"),
        words("[transurethral resection|TURBT]; TURBT; [endoscopic resection|resection through the cystoscope]; endosc. resxn"),
        words("[painless hematuria|gross hematuria|urinary frequency]; [hematuria|freq]; [pink urine|blood seen in the urine]; red urine"),
        stages("I T1 N0 M0 6 40; II T2a N0 M0 15 55; II T2b N0 M0 18 60; IIIA T3a N0 M0 20 65; IIIA T2a N1 M0 20 60; IVA T3b N1 M1a 25 70"),
        "urothelial", (6, 60),
    ),
    Cancer(
        "kidney cancer", "kidney", 2, "MMF",
        sites("""
            C64.# ~ 2 ~ kidney; kidney; [renal parenchyma|kidney]; kidney
            C64.# ~ 1 ~ upper pole; upper pole; superior pole; sup. pole
            C64.# ~ 1 ~ lower pole; lower pole; inferior pole; inf. pole"""),
        histologies("""
            - ~ 4 ~ 1 2 2 3 4 ~ clear cell renal cell carcinoma; [ccRCC|clear cell RCC]; [renal carcinoma of clear cell type|conventional renal carcinoma]; clear-cell renal ca
            - ~ 1 ~ 1 2 3 ~ papillary renal cell carcinoma; pRCC; renal carcinoma of papillary type; papill. renal ca
            - ~ 1 ~ - ~ chromophobe renal cell carcinoma; chRCC; renal carcinoma of chromophobe type; chromoph. renal ca"""),
        words("[the {site} of the {side} kidney|{side} kidney, {site}]; {side} kidney {site}; [kidney ({side}), {site}|the {site} on the {side}]; {side} kidn. {site}"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[partial nephrectomy|radical nephrectomy|nephrectomy]; [PNx|RNx]; [nephron-sparing operation|removal of the kidney]; neph. removal"),
        words("[flank pain|an incidental renal mass on ultrasound|microscopic hematuria]; [flank pain|incid mass]; [aching in the loin|a mass met by chance on a scan]; loin ache"),
        stages("I T1a N0 M0 10 40; I T1b N0 M0 41 70; II T2a N0 M0 71 100; III T3a N0 M0 45 95; III T1b N1 M0 45 70; IV T3a N1 M1 50 100"),
        "nuclear", (12, 100), sided=True, undetermined="9",
    ),
    Cancer(
        "pancreatic cancer", "pancreas", 2, "FM",
        sites("""
            C25.0 ~ 4 ~ [head|uncinate process]; head; [periampullary head|caput]; caput
            C25.1 ~ 2 ~ body; body; corpus; corpus
            C25.2 ~ 2 ~ tail; tail; [cauda|distal tail]; cauda"""),
        histologies("""
            - ~ 5 ~ 1 2 2 3 ~ [ductal adenocarcinoma|pancreatic ductal adenocarcinoma]; PDAC; [duct cell carcinoma|adenocarcinoma of ductal type]; duct-cell ca
            - ~ 1 ~ - ~ acinar cell carcinoma; acinar ca; carcinoma of acinar cells; acin-cell ca"""),
        words("[the {site} of the pancreas|pancreas, {site}|the pancreatic {site}]; [panc {site}|{site} of panc]; [the pancreas at its {site}|pancreas ({site})]; pancr. {site}"),
        words("[the {site} of the pancreas|pancreas, {site}|the pancreatic {site}]; [panc {site}|{site} of panc]; [the pancreas at its {site}|pancreas ({site})]; pancr. {site}"),
        words("[pancreaticoduodenectomy|distal pancreatectomy]; [Whipple|distal panc]; [pancreatic resection|partial removal of the gland]; pancr. resxn"),
        words("[painless jaundice|weight loss and epigastric pain|new-onset diabetes]; [jaundice|wt loss]; [yellow skin|loss of appetite with dark urine]; yellow eyes"),
        stages("IA T1c N0 M0 11 20; IB T2 N0 M0 21 40; IIB T2 N1 M0 21 40; IIA T3 N0 M0 41 60; III T3 N2 M0 41 65; IV T2 N1 M1 22 40"),
        "differentiation", (12, 65),
    ),
    Cancer(
        "liver cancer", "liver", 2, "MMF",
        sites("""
            - ~ 2 ~ segment [2|5|6|7|8]; seg [3|5|6|7|8]; [Couinaud area 6|Couinaud area 7|Couinaud area 4]; S[5|6|8]
            - ~ 1 ~ liver; liver; hepatic parenchyma; liver"""),
        histologies("""
            C22.0 ~ 4 ~ 1 2 2 3 ~ [hepatocellular carcinoma]; HCC; [carcinoma of hepatocytes|primary hepatocellular cancer]; hepatocell. ca
            C22.1 ~ 2 ~ 1 2 3 ~ [intrahepatic cholangiocarcinoma|cholangiocarcinoma]; [iCCA|intrahep cholangio]; [bile duct carcinoma arising within the liver|intrahepatic cholangiocellular carcinoma]; cholangiocell. ca"""),
        words("[hepatic {site}|{site}]; {site}; {site}; {site}"), words("[hepatic {site}|{site}]; {site}; {site}; {site}"),
        words("[partial hepatectomy|segmentectomy]; [hepx|segx]; [liver resection|local liver excision]; liver resxn"),
        words("[a lesion found on surveillance ultrasound|abdominal distension|a rising AFP]; [lesion on surv US|AFP rise]; [a spot seen on a routine liver scan|tightness of the belly]; spot on scan"),
        stages("IA T1a N0 M0 10 20; IB T1b N0 M0 21 80; II T2 N0 M0 22 60; IIIA T3 N0 M0 55 90; IVA T2 N1 M0 22 60"),
        "differentiation", (12, 90),
    ),
    Cancer(
        "stomach cancer", "stomach", 2, "MMF",
        sites("""
            C16.3 ~ 3 ~ [antrum|gastric antrum]; antrum; [antral part of the stomach|prepyloric region]; antral part
            C16.0 ~ 2 ~ [cardia|gastric cardia]; [cardia|GEJ]; [inlet of the stomach|cardial part of the stomach]; cardial part
            C16.2 ~ 2 ~ [gastric body|body of the stomach]; gastric body; [corpus of the stomach]; gastr. corpus"""),
        histologies("""
            - ~ 4 ~ 1 2 2 3 ~ [adenocarcinoma|intestinal-type adenocarcinoma]; [adeno|intest-type adenoCA]; [gland-forming carcinoma|adenocarcinoma of intestinal pattern]; ACA
            - ~ 2 ~ - ~ signet ring cell carcinoma; signet ring ca; [poorly cohesive carcinoma|carcinoma of signet ring cells]; poorly coh. ca"""),
        CLEAR_OF_SITE, CLEAR_OF_SITE,
        words("[subtotal gastrectomy|gastrectomy]; [STG|gastrx]; [partial removal of the stomach|gastric resection]; gastr. resxn"),
        words("[early satiety|dyspepsia|melena]; [satiety|melena]; [feeling full after a few bites|black stools]; black stools"),
        stages("IA T1b N0 M0 8 35; IB T2 N0 M0 15 50; IIA T3 N0 M0 20 70; IIB T3 N1 M0 20 70; IIIA T4a N1 M0 30 90; IV T3 N2 M1 30 90"),
        "differentiation", (10, 85),
    ),
    Cancer(
        "esophageal cancer", "esophagus", 2, "MMF",
        sites("""
            C15.5 ~ 3 ~ [lower third of the esophagus|distal esophagus]; distal esoph; [lower gullet|esophagus in its lower third]; lower gullet
            C15.4 ~ 2 ~ [middle third of the esophagus|mid esophagus]; mid esoph; [mid gullet|esophagus in its middle third]; mid gullet"""),
        histologies("""
            - ~ 3 ~ 1 2 2 3 ~ adenocarcinoma; [adeno|adenoCA]; [Barrett-type adenocarcinoma|gland-forming carcinoma]; ACA
            - ~ 2 ~ 1 2 3 ~ squamous cell carcinoma; [SCC|SqCC]; [epidermoid carcinoma|keratinizing squamous carcinoma]; squam ca"""),
        CLEAR_OF_SITE, CLEAR_OF_SITE,
        words("[esophagectomy|minimally invasive esophagectomy]; [MIE|esophx]; [resection of the gullet|gullet resection with gastric pull-up]; gullet resxn"),
        words("[progressive dysphagia|food sticking|odynophagia]; [dysphagia|odyno]; [trouble swallowing bread|a sense of food halting behind the breastbone]; trouble swallowing"),
        stages("IB T1b N0 M0 8 30; IIA T2 N0 M0 15 45; IIB T2 N1 M0 18 48; III T3 N1 M0 20 70; IIIB T3 N2 M0 25 72; IVB T3 N2 M1 25 75"),
        "differentiation", (8, 72),
    ),
    Cancer(
        "thyroid cancer", "thyroid", 2, "FFFM",
        sites("C73 ~ 1 ~ [thyroid|thyroid gland]; thyroid; [thyroid gland|thyroid]; thyr."),
        histologies("""
            - ~ 4 ~ - ~ papillary thyroid carcinoma; PTC; [papillary carcinoma of classic subtype|carcinoma of papillary type]; papill. ca
            - ~ 1 ~ - ~ follicular thyroid carcinoma; FTC; carcinoma of follicular type; follic. ca
            - ~ 1 ~ - ~ medullary thyroid carcinoma; MTC; carcinoma of C cells; C-cell ca"""),
        words("[the {side} lobe of the {site}|{site}, {side} lobe]; {side} lobe {site}; [the {site} on the {side}|the {side} half of the {site}]; {site} {side} half"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[total thyroidectomy|thyroid lobectomy|hemithyroidectomy]; [TT|hemithyroid]; [removal of the gland|neck operation]; neck op"),
        words("[a neck lump|a thyroid nodule found on examination|hoarseness]; [neck lump|nodule]; [a swelling above the collar|a tight collar]; neck swelling"),
        stages("I T1a N0 M0 4 10; I T1b N0 M0 11 20; I T2 N0 M0 21 40; II T2 N1a M0 21 40; II T3a N1b M0 41 60; III T4a N1b M0 30 65"),
        "", (4, 60), sided=True,
    ),
    Cancer(
        "ovarian cancer", "ovary", 2, "F",
        sites("C56.# ~ 1 ~ [ovary]; ovary; ovary; ovary"),
        histologies("""
            - ~ 4 ~ 3 ~ high-grade serous carcinoma; HGSC; high-grade carcinoma of serous type; high-gr serous ca
            - ~ 2 ~ 1 2 3 ~ endometrioid carcinoma; endometrioid ca; carcinoma of endometrioid type; endomet. ca
            - ~ 1 ~ - ~ [clear cell carcinoma]; clear cell ca; carcinoma of clear cells; clear-cell ca
            - ~ 1 ~ 1 2 ~ mucinous carcinoma; mucinous ca; carcinoma of mucinous type; mucin. ca"""),
        words("[the {side} {site}|{side} {site}]; {side} {site}; [the {site} on the {side}|{site} ({side})]; {side} {site}"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[salpingo-oophorectomy|hysterectomy with salpingo-oophorectomy|debulking surgery]; [BSO|TAH-BSO|debulking]; [cytoreductive operation|staging laparotomy]; staging lap"),
        words("[bloating|pelvic pain|an adnexal mass]; [bloating|adnexal mass]; [a swollen belly|trousers that no longer fit]; belly swelling"),
        stages("IA T1a N0 M0 30 140; IC T1c N0 M0 30 140; IIB T2b N0 M0 30 140; IIIC T3c N1 M0 30 160; IVB T3c N1 M1b 30 160"),
        "differentiation", (28, 150), sided=True, undetermined="9",
    ),
    Cancer(
        "uterine cancer", "uterus", 2, "F",
        sites("""
            C54.1 ~ 5 ~ [endometrium|endometrial cavity]; endometrium; [lining of the womb|endometrial lining]; endometr. lining
            C54.3 ~ 3 ~ [uterine fundus|fundus of the uterus]; fundus; [fundal part of the womb]; womb fundus"""),
        histologies("""
            - ~ 5 ~ 1 1 2 3 ~ [endometrioid adenocarcinoma|endometrioid carcinoma]; endometrioid ca; [adenocarcinoma of endometrioid type|carcinoma of endometrioid type]; endomet. ACA
            - ~ 1 ~ - ~ carcinosarcoma; [carcinosarcoma|MMMT]; malignant mixed Mullerian tumor; mixed Mullerian tu."""),
        CLEAR_OF_SITE, CLEAR_OF_SITE,
        words("[total hysterectomy|robotic hysterectomy]; [TLH|TAH]; [removal of the womb|keyhole hysterectomy]; womb removal"),
        words("[postmenopausal bleeding|irregular bleeding]; [PMB|AUB]; [bleeding long after the change|spotting after the menopause]; spotting"),
        stages("IA T1a N0 M0 8 60; IB T1b N0 M0 12 70; II T2 N0 M0 18 80; IIIC1 T1b N1 M0 18 80; IVB T3a N1 M1 22 80"),
        "figo", (8, 80),
    ),
    Cancer(
        "melanoma", "skin", 2, "FM",
        sites("""
            C43.59 ~ 3 ~ [back|abdominal wall|chest wall]; [back|abd wall]; [trunk|flank]; trunk
            C43.6# ~ 3 ~ [forearm|upper arm|shoulder]; [forearm|arm|shoulder]; [lower arm|elbow]; elbow
            C43.7# ~ 3 ~ [calf|thigh|lower leg]; [calf|thigh|leg]; [shin|knee]; shin"""),
        histologies("""
            - ~ 3 ~ - ~ superficial spreading melanoma; SSM; [melanoma of superficial spreading type]; superf. spread. mel.
            - ~ 2 ~ - ~ nodular melanoma; nod melanoma; melanoma of nodular type; nodul. mel.
            - ~ 1 ~ - ~ desmoplastic melanoma; desmo melanoma; melanoma of desmoplastic type; desmopl. mel."""),
        words("[the {side} {site}|{side} {site}|skin of the {side} {site}]; {side} {site}; [the {site} on the {side}|{site} ({side})]; {side} {site}"),
        words("[the {site}|skin of the {site}]; {site}; the {site}; {site}"),
        words("[wide local excision|wide excision with sentinel node biopsy]; [WLE|WLE+SLNB]; [excision with a broad margin|skin excision with node sampling]; skin excis"),
        words("[a changing mole|a bleeding pigmented lesion]; [changing mole|bleeding mole]; [a dark spot that had grown|a mole that itched]; dark spot"),
        stages("IA T1a N0 M0 4 15; IB T2a N0 M0 5 20; IIA T3a N0 M0 6 25; IIB T3b N0 M0 7 28; IIC T4b N0 M0 8 30; IIIB T2b N1a M0 8 30; IIIC T4a N2a M0 8 32"),
        "", (4, 30), sided=True,
    ),
    Cancer(
        "brain tumor", "brain", 2, "FM",
        sites("""
            C71.1 ~ 3 ~ frontal lobe; frontal; frontal region; front. region
            C71.2 ~ 3 ~ temporal lobe; temporal; temporal region; temp. region
            C71.3 ~ 2 ~ parietal lobe; parietal; parietal region; pariet. region"""),
        histologies("""
            - ~ 4 ~ 4 ~ glioblastoma; GBM; [glioblastoma of IDH wild type]; glioblast.
            - ~ 2 ~ 2 3 4 ~ astrocytoma; [astro|IDH-mut astro]; [astrocytic glioma|astrocytoma with IDH mutation]; astrocyt. glioma
            - ~ 1 ~ 2 3 ~ oligodendroglioma; oligo; oligodendroglial tumor; oligodendrogl."""),
        words("[the {side} {site}|{side} {site}]; {side} {site}; [the {site} on the {side}|brain ({side}), {site}]; {side} {site}"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[craniotomy|craniotomy with gross total resection]; [crani|GTR]; [open brain operation|neurosurgical debulking]; debulk."),
        words("[a first seizure|morning headaches|word-finding difficulty]; [sz|HA]; [a fit at work|headaches on waking]; fit"),
        (), "who", (12, 70), sided=True, surgical=False,
    ),
    Cancer(
        "lymphoma", "lymph nodes", 3, "FM",
        sites("""
            #1 ~ 1 ~ [cervical|neck] lymph nodes; [cerv LN|neck LN]; [nodes of the neck|cervical chain]; cerv. chain
            #4 ~ 1 ~ axillary lymph nodes; ax LN; [nodes of the armpit|axillary chain]; ax. chain"""),
        histologies("""
            C83.3 ~ 1 ~ - ~ diffuse large B-cell lymphoma; DLBCL; [large B-cell lymphoma of diffuse pattern]; large B-cell ly.
            C82.G ~ 1 ~ 2 ~ follicular lymphoma; FL; [lymphoma of follicular pattern]; follic. ly.
            C81.1 ~ 1 ~ - ~ [nodular sclerosis Hodgkin lymphoma|nodular sclerosing Hodgkin lymphoma]; NSHL; Hodgkin disease of nodular sclerosis type; nod. scler. Hodgkin"""),
        words("[the {side} {site}|{side} {site}]; {side} {site}; [the {site} on the {side}|{site} ({side})]; {side} {site}"),
        words("[the {site}|{site}]; {site}; the {site}; {site}"),
        words("[excisional node biopsy|core biopsy]; [exc bx|core bx]; [removal of one node|node sampling]; node sample"),
        words("[a painless swelling|drenching night sweats|itching and weight loss]; [LAD|B sx]; [sheets soaked at night|a lump that did not hurt]; soaked sheets"),
        stages("IA - - - 15 70; IIA - - - 15 90; IIB - - - 20 100; IIIA - - - 15 90; IIIB - - - 20 100; IVB - - - 20 100"),
        "follicular", (15, 95), sided=True, surgical=False,
    ),
    Cancer(
        "leukemia", "blood", 2, "FM",
        sites("""
            0 ~ 1 ~ [not in remission|with active disease|newly diagnosed]; [active dz|new dx]; [with disease still present|found for the first time]; dis. still present
            1 ~ 1 ~ [in complete remission|in remission]; [in CR|in rem]; [with no disease left after treatment|remitted]; remitted"""),
        histologies("""
            C92.0 ~ 1 ~ - ~ acute myeloid leukemia; AML; [acute leukemia of myeloid type]; ac. myel. leuk.
            C91.1 ~ 1 ~ - ~ chronic lymphocytic leukemia; CLL; [chronic leukemia of lymphocytic type]; chron. lymph. leuk."""),
        words("{status}; {status}; {status}; {status}"), words("{status}; {status}; {status}; {status}"),
        words("bone marrow biopsy; BM bx; marrow sampling; marrow sample"),
        words("[fatigue and bruising|an abnormal blood count|recurrent infections]; [fatigue|abnl CBC]; [tiredness with easy bruises|a strange blood count]; easy bruises"),
        (), "", (0, 0), surgical=False,
    ),
)  # fmt: skip
